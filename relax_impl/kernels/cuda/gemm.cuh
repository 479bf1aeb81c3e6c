// C[m, n] = finish(A[m, k] . B[n, k]^T), accumulated in float32 and rounded once.
//
// Two blocks of a cluster share the rows of B: each fetches half of them for both. In a block one
// thread keeps a ring of stages filled, and two warpgroups multiply 64 rows each by up to 256 rows of
// B. Finished tiles leave by way of shared memory. Tails in m, n and k are zeros on the way in and
// cut off on the way out, by the copies themselves. Up to four rows of A go another way.
namespace mpt {

constexpr int TILE_M = 128, TILE_K = 64, MOST_STAGES = 8;
constexpr int A_BYTES = TILE_M * TILE_K * 2;
constexpr int BOX_BYTES = 64 * 128;  // 64 rows of 128 bytes
constexpr int RING_BYTES = 4 * (TILE_M + 256) * TILE_K * 2 + 2 * MOST_STAGES * 8;
constexpr int SHARED_BYTES = 4 * BOX_BYTES + RING_BYTES;

// x Phi(x) by x Phi(x) = max(x, 0) - |x| Phi(-|x|), where the second term keeps its relative precision:
// erfc(t) = exp(-t^2) P(u), u = 1 / (1 + 0.44 t), with P fitted to 5.2e-6 relative for t in [0, 9].
__device__ __forceinline__ float gelu(float x) {
  float a = fabsf(x);
  float u = __fdividef(1.0f, fmaf(0.44f * 0.70710678f, a, 1.0f));
  float p = -0.14607977f;
  p = fmaf(p, u, 0.35056976f);
  p = fmaf(p, u, 0.040833065f);
  p = fmaf(p, u, 0.26352605f);
  p = fmaf(p, u, 0.24258656f);
  p = fmaf(p, u, 0.2485592f);
  float tail = p * u * exp2_fast(x * x * (-0.5f * 1.4426950f));
  return fmaf(-0.5f * a, tail, fmaxf(x, 0.0f));
}

template <typename T, bool BIAS, bool CLIP, bool GELU, bool RESIDUAL>
struct Finish {
  const T* bias;
  const T* residual;
  float limit;
  int m, n;

  // The addends of two neighbouring elements, loaded early.
  __device__ __forceinline__ u32 load(int row, int column) const {
    if (!RESIDUAL || row >= m || column >= n) return 0;
    return __ldg(reinterpret_cast<const u32*>(residual + static_cast<size_t>(row) * n + column));
  }

  __device__ __forceinline__ float one(float x) const {
    if (CLIP) x = fminf(fmaxf(x, -limit), limit);
    return GELU ? gelu(x) : x;
  }

  __device__ __forceinline__ float2 operator()(float x, float y, u32 addend, int column) const {
    if (BIAS && column < n) {
      float2 b = Pair<T>::widen(__ldg(reinterpret_cast<const u32*>(bias + column)));
      x += b.x;
      y += b.y;
    }
    x = one(x);
    y = one(y);
    if (RESIDUAL) {
      float2 r = Pair<T>::widen(addend);
      x += r.x;
      y += r.y;
    }
    return make_float2(x, y);
  }
};

// Put two elements of a row into a box that a copy will take away: 16 byte pieces are swizzled.
template <typename T, typename Out>
__device__ __forceinline__ void place(unsigned char* box, int row, int byte, float2 value) {
  unsigned char* at = box + row * 128 + (((byte >> 4) ^ (row & 7)) << 4) + (byte & 15);
  if (sizeof(Out) == 4) {
    *reinterpret_cast<float2*>(at) = value;
  } else {
    *reinterpret_cast<u32*>(at) = Pair<T>::round(value.x, value.y);
  }
}

// ---- many rows ---------------------------------------------------------------------------------

// Width of a tile and depth of the ring that goes with it. Narrow tiles use the matrix unit less well,
// but where there are few tiles they keep more multiprocessors busy.
template <int WIDTH, int DEPTH>
struct Shape {
  static constexpr int TILE_N = WIDTH, STAGES = DEPTH, B_BYTES = WIDTH * TILE_K * 2;
  static_assert(STAGES * (A_BYTES + B_BYTES) + 2 * STAGES * 8 <= RING_BYTES, "too much");
};

using Wide = Shape<256, 4>;
using Middle = Shape<128, 6>;
using Narrow = Shape<64, 8>;

// What all warpgroups know of the problem.
struct Problem {
  int m, n, k, rank, rows;
  unsigned char* shared;

  template <typename S>
  __device__ __forceinline__ int tiles() const {
    return rows * ((n + S::TILE_N - 1) / S::TILE_N);
  }

  // Time by rough measurement: that of a wide tile is 256.
  template <typename S>
  __device__ __forceinline__ int cost(int tile) const {
    const int clusters = gridDim.x / 2;
    return (tiles<S>() + clusters - 1) / clusters * tile;
  }

  __device__ __forceinline__ int first_row(int tile) const {
    return (tile % rows * 2 + rank) * TILE_M;
  }

  __device__ __forceinline__ unsigned char* boxes() const { return shared; }
  __device__ __forceinline__ unsigned char* a() const { return shared + 4 * BOX_BYTES; }
  template <typename S>
  __device__ __forceinline__ unsigned char* b() const {
    return a() + S::STAGES * A_BYTES;
  }
  __device__ __forceinline__ u64* full() const {
    return reinterpret_cast<u64*>(a() + RING_BYTES - 2 * MOST_STAGES * 8);
  }
  __device__ __forceinline__ u64* empty() const { return full() + MOST_STAGES; }
};

template <typename S>
__device__ __forceinline__ void fetch(const Problem& p, u64 a_map, u64 b_map, u64 b_narrow_map) {
  Ring<S::STAGES> ring;
  const int steps = (p.k + TILE_K - 1) / TILE_K;
  for (int tile = blockIdx.x / 2; tile < p.tiles<S>(); tile += gridDim.x / 2) {
    const int m0 = p.first_row(tile), n0 = tile / p.rows * S::TILE_N;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      u64* barrier = p.full() + ring.stage;
      barrier_wait(p.empty() + ring.stage, ring.phase ^ 1);
      barrier_expect(barrier, A_BYTES + S::B_BYTES);
      load_box(p.a() + ring.stage * A_BYTES, a_map, step * TILE_K, m0, barrier);
      constexpr int HALF = S::TILE_N / 2, ROWS = HALF == 128 ? 128 : 32;
#pragma unroll
      for (int row = 0; row < HALF; row += ROWS) {
        load_box_everywhere(
            p.b<S>() + ring.stage * S::B_BYTES + (p.rank * HALF + row) * 128,
            ROWS == 128 ? b_map : b_narrow_map, step * TILE_K, n0 + p.rank * HALF + row, barrier, 3);
      }
    }
  }
}

template <typename S, typename T, typename Out, typename F>
__device__ __forceinline__ void multiply(const Problem& p, const F& finish, u64 c_map) {
  Ring<S::STAGES> ring;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, steps = (p.k + TILE_K - 1) / TILE_K;
  const u64 a = descriptor(p.a() + (group - 1) * (A_BYTES / 2)), b = descriptor(p.b<S>());
  unsigned char* boxes = p.boxes() + (group - 1) * 2 * BOX_BYTES;
  float acc[S::TILE_N / 2];
  for (int tile = blockIdx.x / 2; tile < p.tiles<S>(); tile += gridDim.x / 2) {
    const int m0 = p.first_row(tile) + (group - 1) * 64, n0 = tile / p.rows * S::TILE_N;
    int previous = 0;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      barrier_wait(p.full() + ring.stage, ring.phase);
      products_begin();
#pragma unroll
      for (int part = 0; part < TILE_K / 16; ++part) {
        Wgmma<T, S::TILE_N>::from_shared(acc, a + ring.stage * (A_BYTES / 16) + part * 2,
                                         b + ring.stage * (S::B_BYTES / 16) + part * 2,
                                         step + part);
      }
      products_commit();
      if (step > 0) {
        products_wait<1>();
        if (thread < 2) barrier_arrive_at(p.empty() + previous, thread);
      }
      previous = ring.stage;
    }
    products_wait<0>();
    if (thread < 2) barrier_arrive_at(p.empty() + previous, thread);

    constexpr int WIDTH = 128 / sizeof(Out);  // columns of a box
    const int row = warp * 16 + lane / 4, column = n0 + lane % 4 * 2;
#pragma unroll
    for (int box = 0; box < S::TILE_N / WIDTH; ++box) {
      unsigned char* to = boxes + box % 2 * BOX_BYTES;
      u32 addends[WIDTH / 4];
#pragma unroll
      for (int i = 0; i < WIDTH / 4; ++i) {
        addends[i] = finish.load(m0 + row + i % 2 * 8, column + box * WIDTH + i / 2 * 8);
      }
      // One box is all that a narrow tile has: then no store may still read it.
      if (thread == 0) store_wait_read<(S::TILE_N > WIDTH ? 1 : 0)>();
      group_sync(group);
#pragma unroll
      for (int i = 0; i < WIDTH / 4; ++i) {
        const int at = (box * (WIDTH / 8) + i / 2) * 4 + i % 2 * 2;
        float2 value = finish(acc[at], acc[at + 1], addends[i], column + box * WIDTH + i / 2 * 8);
        place<T, Out>(to, row + i % 2 * 8, (i / 2 * 8 + lane % 4 * 2) * sizeof(Out), value);
      }
      fence_async();
      group_sync(group);
      if (thread == 0) store_box(c_map, to, n0 + box * WIDTH, m0);
    }
  }
  if (thread == 0) store_wait();
}

template <typename T, typename Out, bool BIAS, bool CLIP, bool GELU, bool RESIDUAL>
__device__ __forceinline__ void gemm(u64 a_map, u64 b_map, u64 b_narrow_map, u64 c_map, const T* x,
                                     const T* weight, Out* out, const T* bias, const T* residual,
                                     int m, int n, int k, float limit, unsigned char* shared) {
  const Finish<T, BIAS, CLIP, GELU, RESIDUAL> finish{bias, residual, limit, m, n};
  if (m <= FEW && few_stages(m, k, SHARED_BYTES) >= FEWEST_STAGES) {
    if (m == 1) few_rows<1, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 2) few_rows<2, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 3) few_rows<3, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 4) few_rows<4, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    return;
  }
  const int rows = (m + 2 * TILE_M - 1) / (2 * TILE_M);
  const Problem p{m, n, k, static_cast<int>(cluster_rank()), rows, shared};
  const int wide = p.cost<Wide>(256), middle = p.cost<Middle>(150), narrow = p.cost<Narrow>(110);
  const bool is_wide = wide <= min(middle, narrow), is_middle = middle <= narrow;
  if (threadIdx.x == 0) {
    for (int i = 0; i < MOST_STAGES; ++i) {
      barrier_init(p.full() + i, 1);
      barrier_init(p.empty() + i, 4);  // two warpgroups of two blocks
    }
    fence_barrier_init();
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      if (is_wide) {
        fetch<Wide>(p, a_map, b_map, b_narrow_map);
      } else if (is_middle) {
        fetch<Middle>(p, a_map, b_map, b_narrow_map);
      } else {
        fetch<Narrow>(p, a_map, b_map, b_narrow_map);
      }
    }
  } else {
    more_registers<232>();
    if (is_wide) {
      multiply<Wide, T, Out>(p, finish, c_map);
    } else if (is_middle) {
      multiply<Middle, T, Out>(p, finish, c_map);
    } else {
      multiply<Narrow, T, Out>(p, finish, c_map);
    }
  }
  cluster_sync();  // nobody leaves while a neighbour still arrives at its barriers
}

}  // namespace mpt
