// Hopper's copies of boxes and matrix products for device.hpp.
//
// A copy happens as soon as it is asked for, and a product as late as it may: when it is waited for.
// So a slot of a ring that is let go too early is overwritten before it is read.
namespace mpt {

// What the copy engine is told of a matrix; the address of one stands for a CUtensorMap.
struct Map {
  unsigned char* data;
  int width, height, item, box_width, box_height;
};

// Shared memory of every block, 1024 bytes aligned.
inline std::vector<unsigned char*> bases;
inline u32 cluster_rank() { return current->block % cluster_size; }

template <typename P>
P* at_neighbour(P* p, u32 rank) {
  const auto offset = reinterpret_cast<unsigned char*>(p) - bases[current->block];
  const int neighbour = current->block / cluster_size * cluster_size + rank;
  return reinterpret_cast<P*>(bases[neighbour] + offset);
}

inline void barrier_arrive_at(u64* barrier, u32 rank) { barrier_arrive(at_neighbour(barrier, rank)); }
inline void barrier_hand_over(u64* barrier, u32 rank) { barrier_arrive_at(barrier, rank); }
inline void barrier_take_over(u64* barrier, u32 parity) { barrier_wait(barrier, parity); }
inline void store_at(float* p, u32 rank, float value) { *at_neighbour(p, rank) = value; }

// Rows of 128 bytes: 16 byte pieces change places with the number of the row.
inline unsigned char* swizzled(unsigned char* linear) {
  const auto address = reinterpret_cast<uintptr_t>(linear);
  return reinterpret_cast<unsigned char*>(address ^ ((address >> 7 & 7) << 4));
}

inline void copy_box(unsigned char* to, const Map& map, int x, int y) {
  if (reinterpret_cast<uintptr_t>(to) % 1024 || map.box_width * map.item != 128) std::abort();
  for (int row = 0; row < map.box_height; ++row) {
    for (int i = 0; i < map.box_width; ++i) {
      unsigned char* at = swizzled(to + row * 128 + i * map.item);
      const bool inside = x + i < map.width && y + row < map.height;
      const size_t from = (static_cast<size_t>(y + row) * map.width + x + i) * map.item;
      if (inside) std::memcpy(at, map.data + from, map.item);
      else std::memset(at, 0, map.item);
    }
  }
}

inline void load_box(unsigned char* to, u64 map, int x, int y, u64* barrier) {
  const Map& of = *reinterpret_cast<const Map*>(map);
  copy_box(to, of, x, y);
  arrived(barrier, of.box_height * 128);
}

inline void load_box_everywhere(unsigned char* to, u64 map, int x, int y, u64* barrier,
                                unsigned short blocks) {
  for (u32 rank = 0; rank < 16; ++rank) {
    if (blocks >> rank & 1) load_box(at_neighbour(to, rank), map, x, y, at_neighbour(barrier, rank));
  }
}

inline void store_box(u64 map, unsigned char* from, int x, int y) {
  const Map& of = *reinterpret_cast<const Map*>(map);
  for (int row = 0; row < of.box_height && y + row < of.height; ++row) {
    for (int i = 0; i < of.box_width && x + i < of.width; ++i) {
      const size_t to = (static_cast<size_t>(y + row) * of.width + x + i) * of.item;
      std::memcpy(of.data + to, swizzled(from + row * 128 + i * of.item), of.item);
    }
  }
}

template <int>
void store_wait_read() {}
inline void store_wait() {}
inline void fence_async() {}
inline void group_sync(u32 name) { meet(3, current->block * 16 + name, 128); }
template <int>
void fewer_registers() {}
template <int>
void more_registers() {}

template <int STAGES>
struct Ring {
  int stage = 0;
  u32 phase = 0;
  void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

inline u64 descriptor(const void* p) { return reinterpret_cast<u64>(p) >> 4; }

// Products of this thread that are not waited for yet, in the order of their groups.
using Group = std::vector<std::function<void()>>;
inline std::map<Thread*, std::vector<Group>> products;
inline void products_begin() {
  if (products[current].empty()) products[current].emplace_back();
}
inline void products_commit() { products[current].emplace_back(); }
template <int PENDING>
void products_wait() {
  auto& mine = products[current];
  while (mine.size() > PENDING + 1) {
    for (auto& product : mine.front()) product();
    mine.erase(mine.begin());
  }
}

template <typename T, int N>
struct Wgmma {
  static void from_shared(float (&d)[N / 2], u64 a, u64 b, int accumulate) {
    float* sums = d;
    products[current].back().push_back([=] {
      const int lane = current->thread % 32, first = current->thread % 128 / 32 * 16 + lane / 4;
      const auto at = [](u64 start, int row, int k) {
        T value;
        std::memcpy(&value, swizzled(reinterpret_cast<unsigned char*>(start << 4) + row * 128 + k * 2), 2);
        return static_cast<float>(value);
      };
      for (int i = 0; i < N / 2; ++i) {
        const int row = first + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = accumulate ? sums[i] : 0.0f;
        for (int k = 0; k < 16; ++k) sum += at(a, row, k) * at(b, column, k);
        sums[i] = sum;
      }
    });
  }
};

}  // namespace mpt
