// The product for up to four rows of A, bound by the memory that holds B.
//
// Every warp streams rows of B, two at a time, through a ring of its own in shared memory: one lane
// asks for the next piece as soon as the warp has read the last one, and nobody waits for another
// warp. The rows of A lie beside the rings; the first pieces of B are under way before A is read.
namespace mpt {

constexpr int FEW = 4;  // rows of A at most
constexpr int FEW_PIECE = 1024;  // elements of a row that are asked for at once
constexpr int FEW_STAGE_BYTES = 2 * FEW_PIECE * 2, FEW_WARPS = 12, FEWEST_STAGES = 2, MOST_FEW_STAGES = 4;

// Pieces that a warp may have under way beside `count` rows of A.
__device__ __forceinline__ int few_stages(int count, int k, int shared_bytes) {
  const int rows = (count * k * 2 + 127) / 128 * 128, barriers = (FEW_WARPS * MOST_FEW_STAGES + 1) * 8;
  return min((shared_bytes - rows - barriers) / (FEW_WARPS * FEW_STAGE_BYTES), MOST_FEW_STAGES);
}

// The rows of B that a warp takes, as one sequence of pieces.
template <typename T>
struct Stream {
  const T* b;
  int n, k, pieces, first, step;
  unsigned char* ring;
  u64* full;
  int stages;

  __device__ __forceinline__ int pairs() const {
    return first < n / 2 ? (n / 2 - first + step - 1) / step : 0;
  }

  __device__ __forceinline__ int elements(int piece) const {
    return min(FEW_PIECE, k - piece * FEW_PIECE);
  }

  // Ask for piece number `index`.
  __device__ __forceinline__ void fetch(int index) const {
    const int pair = first + index / pieces * step, piece = index % pieces, stage = index % stages;
    const u32 bytes = elements(piece) * 2;
    const T* from = b + static_cast<size_t>(pair) * 2 * k + piece * FEW_PIECE;
    unsigned char* to = ring + stage * FEW_STAGE_BYTES;
    barrier_expect(full + stage, 2 * bytes);
    load_bytes(to, from, bytes, full + stage);
    load_bytes(to + FEW_PIECE * 2, from + k, bytes, full + stage);
  }
};

template <int COUNT, typename T, typename Out, typename F>
__device__ __forceinline__ void few_rows(const T* a, const T* b, Out* c, const F& finish, int n,
                                         int k, unsigned char* shared, int shared_bytes) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stages = few_stages(COUNT, k, shared_bytes), eights = k / 8;
  const uint4* rows = reinterpret_cast<const uint4*>(shared);
  unsigned char* rings = shared + (COUNT * k * 2 + 127) / 128 * 128;
  u64* barriers = reinterpret_cast<u64*>(rings + FEW_WARPS * stages * FEW_STAGE_BYTES);
  // Neighbouring rows go to different multiprocessors, whose shares then differ by two rows at most.
  const Stream<T> stream{b,
                         n,
                         k,
                         (k + FEW_PIECE - 1) / FEW_PIECE,
                         static_cast<int>(blockIdx.x + gridDim.x * warp),
                         static_cast<int>(gridDim.x * FEW_WARPS),
                         rings + warp * stages * FEW_STAGE_BYTES,
                         barriers + warp * MOST_FEW_STAGES,
                         stages};
  const int total = stream.pairs() * stream.pieces;
  if (lane == 0) {
    for (int i = 0; i < stages; ++i) barrier_init(stream.full + i, 1);
    fence_barrier_init();
    for (int i = 0; i < min(stages, total); ++i) stream.fetch(i);
  }
  u64* a_full = barriers + FEW_WARPS * MOST_FEW_STAGES;
  if (threadIdx.x == 0) {
    barrier_init(a_full, 1);
    fence_barrier_init();
    next_may_begin();
  }
  previous_done();
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_expect(a_full, COUNT * k * 2);
    load_bytes(shared, a, COUNT * k * 2, a_full);
  }
  barrier_wait(a_full, 0);
  int stage = 0, index = 0;
  u32 phase = 0;
  for (int pair = stream.first; pair < n / 2; pair += stream.step) {
    const u32 addend = lane < COUNT ? finish.load(lane, pair * 2) : 0;
    float acc[2][COUNT];
#pragma unroll
    for (int r = 0; r < COUNT; ++r) acc[0][r] = acc[1][r] = 0.0f;
    for (int piece = 0; piece < stream.pieces; ++piece, ++index) {
      const uint4* held = reinterpret_cast<const uint4*>(stream.ring + stage * FEW_STAGE_BYTES);
      const int here = stream.elements(piece) / 8;
      barrier_wait(stream.full + stage, phase);
#pragma unroll
      for (int i = 0; i < FEW_PIECE / 256; ++i) {
        const int at = i * 32 + lane;
        if (at >= here) continue;
        const uint4 w[2] = {held[at], held[FEW_PIECE / 8 + at]};
#pragma unroll
        for (int r = 0; r < COUNT; ++r) {
          const uint4 x = rows[r * eights + piece * (FEW_PIECE / 8) + at];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 two = Pair<T>::widen(reinterpret_cast<const u32*>(&x)[j]);
#pragma unroll
            for (int o = 0; o < 2; ++o) {
              const float2 weight = Pair<T>::widen(reinterpret_cast<const u32*>(w + o)[j]);
              acc[o][r] = fmaf(two.x, weight.x, acc[o][r]);
              acc[o][r] = fmaf(two.y, weight.y, acc[o][r]);
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0 && index + stages < total) stream.fetch(index + stages);
      if (++stage == stages) {
        stage = 0;
        phase ^= 1;
      }
    }
    float2 mine = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
#pragma unroll
      for (int other = 16; other; other >>= 1) {
        acc[0][r] += __shfl_xor_sync(0xffffffffu, acc[0][r], other);
        acc[1][r] += __shfl_xor_sync(0xffffffffu, acc[1][r], other);
      }
      if (lane == r) mine = make_float2(acc[0][r], acc[1][r]);
    }
    if (lane < COUNT) {
      const float2 value = finish(mine.x, mine.y, addend, pair * 2);
      Out* to = c + static_cast<size_t>(lane) * n + pair * 2;
      if (sizeof(Out) == 4) {
        *reinterpret_cast<float2*>(to) = value;
      } else {
        *reinterpret_cast<u32*>(to) = Pair<T>::round(value.x, value.y);
      }
    }
  }
}

}  // namespace mpt
