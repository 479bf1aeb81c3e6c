// Layer norm or RMS norm of rows: a warp a row, or four where rows are long; each is read once and kept.
namespace mpt {

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int other = 16; other; other >>= 1) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

constexpr int NORM_WARPS = 4, LONG_ROW = 2048;

// Sum over the warps of a row; `parts` is room for one number a warp.
template <int WARPS>
__device__ __forceinline__ float row_sum(float x, float* parts) {
  x = warp_sum(x);
  if constexpr (WARPS > 1) {
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) x += parts[warp];
  }
  return x;
}

template <typename T, int WIDTH, bool RMS, bool BIAS>
__device__ __forceinline__ void norm(const T* x, const T* weight, const T* bias, T* out, int rows,
                                     float epsilon) {
  constexpr int WARPS = WIDTH < LONG_ROW ? 1 : NORM_WARPS, LANES = 32 * WARPS;
  constexpr int PIECES = WIDTH / 8, EACH = (PIECES + LANES - 1) / LANES;
  __shared__ float parts[2][NORM_WARPS];
  const int lane = threadIdx.x % LANES;
  const int row = blockIdx.x * (NORM_WARPS / WARPS) + threadIdx.x / LANES;
  next_may_begin();
  if (row >= rows) return;  // of a long row, the whole block
  const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<size_t>(row) * WIDTH);
  uint4* to = reinterpret_cast<uint4*>(out + static_cast<size_t>(row) * WIDTH);
  uint4 pieces[EACH], weights[EACH], biases[EACH];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * LANES + lane;
    weights[i] = biases[i] = make_uint4(0, 0, 0, 0);
    if (at >= PIECES) continue;
    weights[i] = __ldg(reinterpret_cast<const uint4*>(weight) + at);
    if (BIAS) biases[i] = __ldg(reinterpret_cast<const uint4*>(bias) + at);
  }
  previous_done();
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * LANES + lane;
    pieces[i] = at < PIECES ? fresh(from + at) : make_uint4(0, 0, 0, 0);
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
  const float mean = RMS ? 0.0f : __fdiv_rn(row_sum<WARPS>(sum, parts[0]), WIDTH);
  float power = 0.0f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (i * LANES + lane >= PIECES) continue;
    const u32* pair = reinterpret_cast<const u32*>(pieces + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 two = Pair<T>::widen(pair[j]);
      power = fmaf(two.x - mean, two.x - mean, power);
      power = fmaf(two.y - mean, two.y - mean, power);
    }
  }
  // Rounded to nearest whatever the flags: an error of it is that of the whole row.
  const float scale = __frsqrt_rn(__fdiv_rn(row_sum<WARPS>(power, parts[1]), WIDTH) + epsilon);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int at = i * LANES + lane;
    if (at >= PIECES) continue;
    const u32* pair = reinterpret_cast<const u32*>(pieces + i);
    u32 result[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float2 two = Pair<T>::widen(pair[j]);
      float2 w = Pair<T>::widen(reinterpret_cast<const u32*>(weights + i)[j]);
      float2 b = Pair<T>::widen(reinterpret_cast<const u32*>(biases + i)[j]);
      result[j] = Pair<T>::round(fmaf((two.x - mean) * scale, w.x, b.x),
                                 fmaf((two.y - mean) * scale, w.y, b.y));
    }
    to[at] = make_uint4(result[0], result[1], result[2], result[3]);
  }
}

}  // namespace mpt
