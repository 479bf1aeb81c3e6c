// C[m, n] = finish(A[m, k] . B[n, k]^T), accumulated in float32 and rounded once.
//
// The two blocks of a cluster share rows of A, rows of B, or a tile. In a block one thread keeps a
// ring of stages filled with A, one with B, and two warpgroups multiply 64 rows each by up to 256 rows
// of B; one whose rows lie beyond the end does nothing. Tails in m, n and k are zeros on the way in and
// cut off on the way out, by the copies themselves. Up to four rows of A go another way.
namespace mpt {

// How the copy engine is told of A and B: by the rows of a box.
struct Maps {
  u64 a_128, a_64, a_8, b_128, b_32;
};

// Fill the ring with rows of A, one tile after another.
template <typename S>
__device__ __forceinline__ void fetch_a(const Problem& p, const Maps& maps) {
  constexpr int HALF = TILE_M / 2;
  Ring<S::STAGES> ring;
  for (int tile = p.cluster; tile < p.tiles<S>(); tile += p.clusters) {
    const int m0 = p.first_row<S>(tile), left = p.m - m0;
    // Of the last rows only those are fetched that are there, and need be: what the others hold is
    // multiplied, and goes nowhere.
    const int eights = left > 32 ? 0 : left > 0 ? (left + 7) / 8 : 0;
    const bool one_half = left <= HALF, here = S::COMMON != ROWS || p.rank == 0;
    const u32 bytes = left <= 0 ? 0 : eights ? eights * 1024 : one_half ? A_BYTES / 2 : A_BYTES;
    const unsigned short blocks = S::COMMON == ROWS ? 3 : 1 << p.rank;
    for (int step = p.first_step<S>(); step < p.last_step<S>(); ++step, ring.advance()) {
      u64* barrier = p.full() + ring.stage;
      unsigned char* to = p.a() + ring.stage * A_BYTES;
      const int x = step * TILE_K;
      barrier_wait(p.empty() + ring.stage, ring.phase ^ 1);
      barrier_expect(barrier, bytes);
      if (eights) {
        for (int i = 0; here && i < eights; ++i) {
          load_box_everywhere(to + i * 1024, maps.a_8, x, m0 + i * 8, barrier, blocks);
        }
      } else if (one_half) {
        if (here && left > 0) load_box_everywhere(to, maps.a_64, x, m0, barrier, blocks);
      } else if (S::COMMON == ROWS) {
        const int at = p.rank * HALF;
        load_box_everywhere(to + at * 128, maps.a_64, x, m0 + at, barrier, blocks);
      } else {
        load_box(to, maps.a_128, x, m0, barrier);
      }
    }
  }
}

// Fill the ring with rows of B.
template <typename S>
__device__ __forceinline__ void fetch_b(const Problem& p, const Maps& maps) {
  constexpr int OWN = S::COMMON == COLUMNS ? S::TILE_N / 2 : S::TILE_N;  // rows this block asks for
  constexpr int PART = OWN % 128 == 0 ? 128 : 32;
  static_assert(OWN % PART == 0, "whole boxes");
  Ring<S::STAGES> ring;
  for (int tile = p.cluster; tile < p.tiles<S>(); tile += p.clusters) {
    const int n0 = p.first_column<S>(tile);
    for (int step = p.first_step<S>(); step < p.last_step<S>(); ++step, ring.advance()) {
      u64* barrier = p.full() + ring.stage;
      unsigned char* to = p.b<S>() + ring.stage * S::B_BYTES;
      barrier_wait(p.empty() + ring.stage, ring.phase ^ 1);
      barrier_expect(barrier, S::B_BYTES);
#pragma unroll
      for (int part = 0; part < OWN; part += PART) {
        const u64 map = PART == 128 ? maps.b_128 : maps.b_32;
        if (S::COMMON == COLUMNS) {
          const int at = p.rank * OWN + part;
          load_box_everywhere(to + at * 128, map, step * TILE_K, n0 + at, barrier, 3);
        } else {
          load_box(to + part * 128, map, step * TILE_K, n0 + part, barrier);
        }
      }
    }
  }
}

// Let go of a slot of the ring; the other block waits for it too if it writes there.
template <typename S>
__device__ __forceinline__ void let_go(const Problem& p, int stage, int thread) {
  if (thread < 2) barrier_arrive_at(p.empty() + stage, S::COMMON == TILE ? p.rank : thread);
}

// Sums of 64 x TILE_N results over the steps of this block.
template <typename S, typename T>
__device__ __forceinline__ void accumulate(const Problem& p, Ring<S::STAGES>& ring, u64 a, u64 b,
                                           int thread, float (&acc)[S::TILE_N / 2]) {
  const int steps = p.last_step<S>() - p.first_step<S>();
  int previous = 0;
  for (int step = 0; step < steps; ++step, ring.advance()) {
    barrier_wait(p.full() + ring.stage, ring.phase);
    products_begin();
#pragma unroll
    for (int part = 0; part < TILE_K / 16; ++part) {
      Wgmma<T, S::TILE_N>::from_shared(acc, a + ring.stage * (A_BYTES / 16) + part * 2,
                                       b + ring.stage * (S::B_BYTES / 16) + part * 2, step + part);
    }
    products_commit();
    if (step > 0) {
      products_wait<1>();
      let_go<S>(p, previous, thread);
    }
    previous = ring.stage;
  }
  products_wait<0>();
  let_go<S>(p, previous, thread);
}

// Results leave by way of shared memory.
template <typename S, typename T, typename Out, typename F>
__device__ __forceinline__ void leave(const float (&acc)[S::TILE_N / 2], const F& finish, u64 c_map,
                                      unsigned char* boxes, int group, int m0, int n0) {
  constexpr int WIDTH = 128 / sizeof(Out);  // columns of a box
  static_assert(S::TILE_N / WIDTH % 2 == 0, "two boxes take turns");
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4, column = n0 + lane % 4 * 2;
#pragma unroll
  for (int box = 0; box < S::TILE_N / WIDTH; ++box) {
    unsigned char* to = boxes + box % 2 * BOX_BYTES;
    u32 addends[WIDTH / 4];
#pragma unroll
    for (int i = 0; i < WIDTH / 4; ++i) {
      addends[i] = finish.load(m0 + row + i % 2 * 8, column + box * WIDTH + i / 2 * 8);
    }
    if (thread == 0) store_wait_read<1>();
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

// Each block of the cluster gets the other's sums of half of the columns, and finishes these.
template <typename S, typename T, typename Out, typename F>
__device__ __forceinline__ void join(const Problem& p, const float (&acc)[S::TILE_N / 2],
                                     const F& finish, Out* out, int group, int m0, int n0) {
  constexpr int HALF = S::TILE_N / 4;  // results of a thread in half of the columns
  static_assert(2 * HALF * 128 * 4 <= 4 * BOX_BYTES, "room of both warpgroups");
  const int thread = threadIdx.x % 128, lane = thread % 32;
  float* room = reinterpret_cast<float*>(p.boxes()) + (group - 1) * HALF * 128 + thread;
  u64* handed = p.handed() + group - 1;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    store_at(room + i * 128, 1 - p.rank, p.rank ? acc[i] : acc[HALF + i]);
  }
  barrier_hand_over(handed, 1 - p.rank);
  barrier_take_over(handed, 0);
  const int row = m0 + thread / 32 * 16 + lane / 4;
  const int column = n0 + p.rank * (S::TILE_N / 2) + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < HALF; i += 2) {
    const int r = row + i / 2 % 2 * 8, c = column + i / 4 * 8;
    if (r >= p.m || c >= p.n) continue;
    const float x = (p.rank ? acc[HALF + i] : acc[i]) + room[i * 128];
    const float y = (p.rank ? acc[HALF + i + 1] : acc[i + 1]) + room[(i + 1) * 128];
    const float2 value = finish(x, y, finish.load(r, c), c);
    Out* to = out + static_cast<size_t>(r) * p.n + c;
    if (sizeof(Out) == 4) {
      *reinterpret_cast<float2*>(to) = value;
    } else {
      *reinterpret_cast<u32*>(to) = Pair<T>::round(value.x, value.y);
    }
  }
}

template <typename S, typename T, typename Out, typename F>
__device__ __forceinline__ void multiply(const Problem& p, const F& finish, Out* out, u64 c_map) {
  Ring<S::STAGES> ring;
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  const u64 a = descriptor(p.a() + (group - 1) * (A_BYTES / 2)), b = descriptor(p.b<S>());
  float acc[S::TILE_N / 2];
  for (int tile = p.cluster; tile < p.tiles<S>(); tile += p.clusters) {
    const int m0 = p.first_row<S>(tile) + (group - 1) * 64, n0 = p.first_column<S>(tile);
    if (m0 >= p.m) {
      // No rows: let the others go on.
      for (int step = p.first_step<S>(); step < p.last_step<S>(); ++step, ring.advance()) {
        barrier_wait(p.full() + ring.stage, ring.phase);
        let_go<S>(p, ring.stage, thread);
      }
      continue;
    }
    accumulate<S, T>(p, ring, a, b, thread, acc);
    if constexpr (S::COMMON == TILE) {
      join<S, T>(p, acc, finish, out, group, m0, n0);
    } else {
      leave<S, T, Out>(acc, finish, c_map, p.boxes() + (group - 1) * 2 * BOX_BYTES, group, m0, n0);
    }
  }
  if (thread == 0) store_wait();
}

template <typename S, typename T, typename Out, typename F>
__device__ __forceinline__ void work(const Problem& p, const Maps& maps, const F& finish, Out* out,
                                     u64 c_map) {
  if (threadIdx.x < 128) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      next_may_begin();
      previous_done();
      fetch_a<S>(p, maps);
    }
    if (threadIdx.x == 32) fetch_b<S>(p, maps);
  } else {
    more_registers<232>();
    previous_done();
    multiply<S, T>(p, finish, out, c_map);
  }
}

template <typename T, typename Out, bool BIAS, bool CLIP, bool GELU, bool RESIDUAL>
__device__ __forceinline__ void gemm(u64 a_128, u64 a_64, u64 a_8, u64 b_128, u64 b_32, u64 c_map,
                                     const T* x, const T* weight, Out* out, const T* bias,
                                     const T* residual, int m, int n, int k, int blocks, float limit,
                                     unsigned char* shared) {
  const Finish<T, BIAS, CLIP, GELU, RESIDUAL> finish{bias, residual, limit, m, n};
  if (m <= FEW && few_stages(m, k, SHARED_BYTES) >= FEWEST_STAGES) {
    if (m == 1) few_rows<1, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 2) few_rows<2, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 3) few_rows<3, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    if (m == 4) few_rows<4, T, Out>(x, weight, out, finish, n, k, shared, SHARED_BYTES);
    return;
  }
  const int cluster = blockIdx.x / 2;
  const Problem p{m, n, k, static_cast<int>(cluster_rank()), cluster, blocks / 2, shared};
  const Maps maps{a_128, a_64, a_8, b_128, b_32};
  if (threadIdx.x == 0) {
    for (int i = 0; i < MOST_STAGES; ++i) {
      barrier_init(p.full() + i, 2);   // A and B
      barrier_init(p.empty() + i, 4);  // two warpgroups, twice
    }
    for (int i = 0; i < 2; ++i) barrier_init(p.handed() + i, 128);
    fence_barrier_init();
  }
  cluster_sync();
  switch (choice(p)) {
    case 0: work<WideColumns, T>(p, maps, finish, out, c_map); break;
    case 1: work<MiddleColumns, T>(p, maps, finish, out, c_map); break;
    case 2: work<WideRows, T>(p, maps, finish, out, c_map); break;
    case 3: work<MiddleRows, T>(p, maps, finish, out, c_map); break;
    case 4: work<MiddleTile, T>(p, maps, finish, out, c_map); break;
    default: work<NarrowTile, T>(p, maps, finish, out, c_map);
  }
  cluster_sync();  // nobody leaves while a neighbour still arrives at its barriers
}

}  // namespace mpt
