// How a product is cut into tiles, and which tiles a cluster of two blocks takes.
namespace mpt {

constexpr int TILE_M = 128, TILE_K = 64, MOST_STAGES = 8;
constexpr int A_BYTES = TILE_M * TILE_K * 2;
constexpr int BOX_BYTES = 64 * 128;  // 64 rows of 128 bytes
constexpr int RING_BYTES = 4 * (TILE_M + 256) * TILE_K * 2 + 2 * MOST_STAGES * 8;
constexpr int SHARED_BYTES = 4 * BOX_BYTES + RING_BYTES + 64;

// What the two blocks of a cluster have in common.
enum Common {
  COLUMNS,  // 128 rows of A each, and the same rows of B: each fetches half of these for both
  ROWS,     // the same rows of A, of which each fetches half for both, and columns of its own
  TILE,     // everything but k, of which each takes half; then they add up
};

// Width of a tile, depth of the ring that goes with it, and what a cluster takes for 64 of k where
// nobody waits for memory, measured in nanoseconds.
template <int WIDTH, int DEPTH, Common IN_COMMON, int MEASURED = 0>
struct Shape {
  static constexpr int TILE_N = WIDTH, STAGES = DEPTH, COST = MEASURED, B_BYTES = WIDTH * TILE_K * 2;
  static constexpr Common COMMON = IN_COMMON;
  static constexpr int HEIGHT = COMMON == COLUMNS ? 2 * TILE_M : TILE_M;  // of a cluster's tile
  static constexpr int WHOLE = COMMON == ROWS ? 2 * WIDTH : WIDTH;        // its width
  static_assert(STAGES * (A_BYTES + B_BYTES) + 2 * STAGES * 8 <= RING_BYTES, "too much");
};

using WideColumns = Shape<256, 4, COLUMNS, 740>;
using MiddleColumns = Shape<128, 6, COLUMNS, 385>;
using WideRows = Shape<256, 4, ROWS, 750>;
using MiddleRows = Shape<128, 6, ROWS, 450>;
using MiddleTile = Shape<128, 6, TILE>;
using NarrowTile = Shape<64, 8, TILE>;

// What all warpgroups know of the problem.
struct Problem {
  int m, n, k, rank, cluster, clusters;
  unsigned char* shared;

  template <typename S>
  __device__ __forceinline__ int rows() const {
    return (m + S::HEIGHT - 1) / S::HEIGHT;
  }
  template <typename S>
  __device__ __forceinline__ int columns() const {
    return (n + S::WHOLE - 1) / S::WHOLE;
  }
  template <typename S>
  __device__ __forceinline__ int tiles() const {
    return rows<S>() * columns<S>();
  }
  // How often a cluster begins a tile, and what that costs.
  template <typename S>
  __device__ __forceinline__ int rounds() const {
    return (tiles<S>() + clusters - 1) / clusters;
  }
  template <typename S>
  __device__ __forceinline__ int cost() const {
    return rounds<S>() * S::COST;
  }

  // Rows change fastest: tiles that share rows of B are done at one time.
  template <typename S>
  __device__ __forceinline__ int first_row(int tile) const {
    const int row = tile % rows<S>();
    return S::COMMON == COLUMNS ? (row * 2 + rank) * TILE_M : row * TILE_M;
  }
  template <typename S>
  __device__ __forceinline__ int first_column(int tile) const {
    const int column = tile / rows<S>();
    return (S::COMMON == ROWS ? column * 2 + rank : column) * S::TILE_N;
  }

  __device__ __forceinline__ int steps() const { return (k + TILE_K - 1) / TILE_K; }
  // Steps of this block: from the first to before the last.
  template <typename S>
  __device__ __forceinline__ int first_step() const {
    return S::COMMON == TILE && rank ? (steps() + 1) / 2 : 0;
  }
  template <typename S>
  __device__ __forceinline__ int last_step() const {
    return S::COMMON == TILE && !rank ? (steps() + 1) / 2 : steps();
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
  // One a warpgroup: the other block has handed over what it knows of a tile.
  __device__ __forceinline__ u64* handed() const { return empty() + MOST_STAGES; }
};

// The shape that is expected to be done first, as a number in the order above. Blocks that halve a
// tile can hand over once, and do so where there would be few tiles otherwise. What n and k rule out,
// which are constants to the compiler, is not compiled.
__device__ __forceinline__ int choice(const Problem& p) {
  if (p.steps() >= 16) {
    if (p.columns<NarrowTile>() <= p.clusters && p.m <= TILE_M) return 5;
    if (p.columns<MiddleTile>() <= p.clusters && p.rounds<MiddleTile>() == 1) return 4;
  }
  const int columns = min(p.cost<WideColumns>(), p.cost<MiddleColumns>());
  const int rows = min(p.cost<WideRows>(), p.cost<MiddleRows>());
  if (columns <= rows) return columns == p.cost<WideColumns>() ? 0 : 1;
  return rows == p.cost<WideRows>() ? 2 : 3;
}

}  // namespace mpt
