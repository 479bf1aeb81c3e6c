// C[m, n] = finish(A[m, k] . B[n, k]^T), accumulated in float32 and rounded once.
//
// The two blocks of a cluster share what both need: with many rows those of B, of which each fetches
// half for both; with few rows those of A, while each has columns of its own. In a block one thread
// keeps a ring of stages filled, and two warpgroups multiply 64 rows each by up to 256 rows of B; one
// whose rows lie beyond the end does nothing. Finished tiles leave by way of shared memory. Tails in
// m, n and k are zeros on the way in and cut off on the way out, by the copies themselves. Up to four
// rows of A go another way.
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
// but where there are few tiles they keep more multiprocessors busy. TIME is that of a tile whose two
// warpgroups both work, by rough measurement; one alone takes about half.
template <int WIDTH, int DEPTH, int TIME>
struct Shape {
  static constexpr int TILE_N = WIDTH, STAGES = DEPTH, COST = TIME, B_BYTES = WIDTH * TILE_K * 2;
  static_assert(STAGES * (A_BYTES + B_BYTES) + 2 * STAGES * 8 <= RING_BYTES, "too much");
};

using Wide = Shape<256, 4, 256>;
using Middle = Shape<128, 6, 150>;
using Third = Shape<96, 6, 120>;
using Narrow = Shape<64, 8, 110>;
using Thin = Shape<32, 8, 80>;

// Which tiles a cluster takes, one after another: first those of full rows, then what is left of the
// last rows, at most 64. Such a rest takes half the time, so that clusters with one full tile less
// than others begin with two of them.
struct Tiles {
  int cluster, clusters, full, rest, columns;

  // The `i`-th tile of this cluster, or false if it has fewer.
  __device__ __forceinline__ bool at(int i, int& row, int& column) const {
    const int all = full * columns, more = all % clusters, spare = more ? clusters - more : 0;
    const int mine = cluster < all ? (all - cluster + clusters - 1) / clusters : 0;
    if (i < mine) {
      const int tile = cluster + i * clusters;
      row = tile % full;
      column = tile / full;
      return true;
    }
    row = full;
    i -= mine;
    if (spare && cluster >= more) {
      column = i < 2 ? cluster - more + i * spare : 2 * spare + cluster + (i - 2) * clusters;
    } else {
      column = 2 * spare + cluster + i * clusters;
    }
    return rest && column < columns;
  }

  // Time until the last cluster is done, if a full tile takes `cost`.
  __device__ __forceinline__ int time(int cost) const {
    const int all = full * columns, halves = 2 * all + (rest ? columns : 0);
    const int even = (halves + clusters - 1) / clusters, least = (all + clusters - 1) / clusters;
    return max(even, 2 * least) * cost / 2;
  }
};

// What all warpgroups know of the problem.
struct Problem {
  int m, n, k, rank;
  unsigned char* shared;

  // Rows that the tiles of a cluster cover together.
  __device__ __forceinline__ static int height(bool share_a) {
    return share_a ? TILE_M : 2 * TILE_M;
  }

  template <typename S>
  __device__ __forceinline__ Tiles tiles(bool share_a) const {
    const int width = share_a ? 2 * S::TILE_N : S::TILE_N, left = m % height(share_a);
    const int full = m / height(share_a) + (left > 64);
    return Tiles{static_cast<int>(blockIdx.x / 2), static_cast<int>(gridDim.x / 2), full,
                 left > 0 && left <= 64, (n + width - 1) / width};
  }

  template <typename S>
  __device__ __forceinline__ int time(bool share_a) const {
    return tiles<S>(share_a).time(S::COST);
  }

  __device__ __forceinline__ int first_row(bool share_a, int row) const {
    return share_a ? row * TILE_M : (row * 2 + rank) * TILE_M;
  }
  template <typename S>
  __device__ __forceinline__ int first_column(bool share_a, int column) const {
    return (share_a ? column * 2 + rank : column) * S::TILE_N;
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

// How the copy engine is told of A and B: boxes of 128 rows, and of fewer.
struct Maps {
  u64 a, a_half, b, b_part;  // 128, 64, 128 and 32 rows
};

// Fill the ring with what the tiles of this cluster need, one tile after another.
template <typename S, bool SHARE_A>
__device__ __forceinline__ void fetch(const Problem& p, const Maps& maps) {
  constexpr int OWN = SHARE_A ? S::TILE_N : S::TILE_N / 2;  // rows of B that this block asks for
  constexpr int PART = OWN % 128 == 0 ? 128 : 32;
  static_assert(OWN % PART == 0, "whole boxes");
  Ring<S::STAGES> ring;
  const Tiles tiles = p.tiles<S>(SHARE_A);
  const int steps = (p.k + TILE_K - 1) / TILE_K;
  int row, column;
  for (int i = 0; tiles.at(i, row, column); ++i) {
    const int m0 = p.first_row(SHARE_A, row), n0 = p.first_column<S>(SHARE_A, column);
    // The last rows are those of the first warpgroup of the first block alone.
    const bool rest = row == tiles.full;
    const u32 a_bytes = !rest ? A_BYTES : SHARE_A || p.rank == 0 ? A_BYTES / 2 : 0;
    for (int step = 0; step < steps; ++step, ring.advance()) {
      u64* barrier = p.full() + ring.stage;
      unsigned char *a = p.a() + ring.stage * A_BYTES, *b = p.b<S>() + ring.stage * S::B_BYTES;
      const int x = step * TILE_K;
      barrier_wait(p.empty() + ring.stage, ring.phase ^ 1);
      barrier_expect(barrier, a_bytes + S::B_BYTES);
      if (SHARE_A) {
        if (!rest || p.rank == 0) {
          const int half = p.rank * (TILE_M / 2);
          load_box_everywhere(a + half * 128, maps.a_half, x, m0 + half, barrier, 3);
        }
      } else if (!rest) {
        load_box(a, maps.a, x, m0, barrier);
      } else if (p.rank == 0) {
        load_box(a, maps.a_half, x, m0, barrier);
      }
#pragma unroll
      for (int part = 0; part < OWN; part += PART) {
        const u64 map = PART == 128 ? maps.b : maps.b_part;
        if (SHARE_A) {
          load_box(b + part * 128, map, x, n0 + part, barrier);
        } else {
          const int at = p.rank * OWN + part;
          load_box_everywhere(b + at * 128, map, x, n0 + at, barrier, 3);
        }
      }
    }
  }
}

// Let the other warpgroups go on where this one has no rows.
template <typename S>
__device__ __forceinline__ void pass(const Problem& p, Ring<S::STAGES>& ring, int steps, int thread) {
  for (int step = 0; step < steps; ++step, ring.advance()) {
    barrier_wait(p.full() + ring.stage, ring.phase);
    if (thread < 2) barrier_arrive_at(p.empty() + ring.stage, thread);
  }
}

template <typename S, typename T, typename Out, typename F>
__device__ __forceinline__ void multiply(const Problem& p, const F& finish, Out* out, u64 c_map,
                                         bool share_a) {
  Ring<S::STAGES> ring;
  const Tiles tiles = p.tiles<S>(share_a);
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const int warp = thread / 32, lane = thread % 32, steps = (p.k + TILE_K - 1) / TILE_K;
  const u64 a = descriptor(p.a() + (group - 1) * (A_BYTES / 2)), b = descriptor(p.b<S>());
  unsigned char* boxes = p.boxes() + (group - 1) * 2 * BOX_BYTES;
  float acc[S::TILE_N / 2];
  int row_tile, column_tile;
  for (int i = 0; tiles.at(i, row_tile, column_tile); ++i) {
    const int m0 = p.first_row(share_a, row_tile) + (group - 1) * 64;
    const int n0 = p.first_column<S>(share_a, column_tile);
    if (m0 >= p.m) {
      pass<S>(p, ring, steps, thread);
      continue;
    }
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
    if constexpr (S::TILE_N % WIDTH) {
      // No whole number of boxes: such tiles are for few rows, which may leave as they are.
#pragma unroll
      for (int j = 0; j < S::TILE_N / 4; ++j) {
        const int r = m0 + row + j % 2 * 8, c = column + j / 2 * 8;
        if (r >= p.m || c >= p.n) continue;
        const float2 value = finish(acc[j * 2], acc[j * 2 + 1], finish.load(r, c), c);
        *reinterpret_cast<u32*>(out + static_cast<size_t>(r) * p.n + c) =
            Pair<T>::round(value.x, value.y);
      }
    } else {
#pragma unroll
      for (int box = 0; box < S::TILE_N / WIDTH; ++box) {
        unsigned char* to = boxes + box % 2 * BOX_BYTES;
        u32 addends[WIDTH / 4];
#pragma unroll
        for (int i = 0; i < WIDTH / 4; ++i) {
          addends[i] = finish.load(m0 + row + i % 2 * 8, column + box * WIDTH + i / 2 * 8);
        }
        // After an odd number of boxes the next tile begins with the one that is still on its way.
        if (thread == 0) store_wait_read<(S::TILE_N / WIDTH % 2 ? 0 : 1)>();
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
  }
  if (thread == 0) store_wait();
}

// The tiles that are done first: number in this list, of which the first three share B.
__device__ __forceinline__ int choice(const Problem& p) {
  const int times[] = {p.time<Wide>(false), p.time<Middle>(false), p.time<Narrow>(false),
                       p.time<Wide>(true),  p.time<Middle>(true),  p.time<Third>(true),
                       p.time<Thin>(true)};
  int best = 0;
#pragma unroll
  for (int i = 1; i < 7; ++i) {
    if (times[i] < times[best]) best = i;
  }
  return best;
}

template <typename T, typename Out, bool BIAS, bool CLIP, bool GELU, bool RESIDUAL>
__device__ __forceinline__ void gemm(u64 a_map, u64 a_half_map, u64 b_map, u64 b_part_map, u64 c_map,
                                     const T* x, const T* weight, Out* out, const T* bias,
                                     const T* residual, int m, int n, int k, float limit,
                                     unsigned char* shared) {
  const Finish<T, BIAS, CLIP, GELU, RESIDUAL> finish{bias, residual, limit, m, n};
  if (m <= FEW && few_stages(m, k, SHARED_BYTES) >= FEWEST_STAGES) {
    if (m == 1) few_rows<1, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 2) few_rows<2, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 3) few_rows<3, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 4) few_rows<4, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    return;
  }
  const Problem p{m, n, k, static_cast<int>(cluster_rank()), shared};
  const int chosen = choice(p);
  const bool share_a = chosen >= 3;
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
      const Maps maps{a_map, a_half_map, b_map, b_part_map};
      if (chosen == 0) fetch<Wide, false>(p, maps);
      if (chosen == 1) fetch<Middle, false>(p, maps);
      if (chosen == 2) fetch<Narrow, false>(p, maps);
      if (chosen == 3) fetch<Wide, true>(p, maps);
      if (chosen == 4) fetch<Middle, true>(p, maps);
      if (chosen == 5) fetch<Third, true>(p, maps);
      if (chosen == 6) fetch<Thin, true>(p, maps);
    }
  } else {
    more_registers<232>();
    if (chosen == 0 || chosen == 3) multiply<Wide, T, Out>(p, finish, out, c_map, share_a);
    if (chosen == 1 || chosen == 4) multiply<Middle, T, Out>(p, finish, out, c_map, share_a);
    if (chosen == 2) multiply<Narrow, T, Out>(p, finish, out, c_map, false);
    if (chosen == 5) multiply<Third, T, Out>(p, finish, out, c_map, true);
    if (chosen == 6) multiply<Thin, T, Out>(p, finish, out, c_map, true);
  }
  cluster_sync();  // nobody leaves while a neighbour still arrives at its barriers
}

}  // namespace mpt
