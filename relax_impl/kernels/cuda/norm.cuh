// Layer norm or RMS norm of rows: one warp a row, which it reads once and keeps.
namespace mpt {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int other = 16; other; other >>= 1) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

template <typename T, int WIDTH, bool RMS, bool BIAS>
__device__ __forceinline__ void norm(const T* x, const T* weight, const T* bias, T* out, int rows,
                                     float epsilon) {
  constexpr int PIECES = WIDTH / 8, EACH = (PIECES + 31) / 32;
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<size_t>(row) * WIDTH);
  uint4* to = reinterpret_cast<uint4*>(out + static_cast<size_t>(row) * WIDTH);
  uint4 pieces[EACH];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * 32 + lane;
    pieces[i] = at < PIECES ? from[at] : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const u32* pair = reinterpret_cast<const u32*>(pieces + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 two = Pair<T>::widen(pair[j]);
      sum += two.x + two.y;
    }
  }
  const float mean = RMS ? 0.0f : __fdiv_rn(warp_sum(sum), WIDTH);
  float power = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (i * 32 + lane >= PIECES) continue;
    const u32* pair = reinterpret_cast<const u32*>(pieces + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 two = Pair<T>::widen(pair[j]);
      power = fmaf(two.x - mean, two.x - mean, power);
      power = fmaf(two.y - mean, two.y - mean, power);
    }
  }
  // Rounded to nearest whatever the flags: an error of it is that of the whole row.
  const float scale = __frsqrt_rn(__fdiv_rn(warp_sum(power), WIDTH) + epsilon);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * 32 + lane;
    if (at >= PIECES) continue;
    const u32* pair = reinterpret_cast<const u32*>(pieces + i);
    const uint4 weights = __ldg(reinterpret_cast<const uint4*>(weight) + at);
    uint4 biases = make_uint4(0, 0, 0, 0);
    if (BIAS) biases = __ldg(reinterpret_cast<const uint4*>(bias) + at);
    u32 result[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 two = Pair<T>::widen(pair[j]);
      float2 w = Pair<T>::widen(reinterpret_cast<const u32*>(&weights)[j]);
      float2 b = Pair<T>::widen(reinterpret_cast<const u32*>(&biases)[j]);
      result[j] = Pair<T>::round(fmaf((two.x - mean) * scale, w.x, b.x),
                                 fmaf((two.y - mean) * scale, w.y, b.y));
    }
    to[at] = make_uint4(result[0], result[1], result[2], result[3]);
  }
}

}  // namespace mpt
