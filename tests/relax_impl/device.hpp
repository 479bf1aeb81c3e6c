// Enough of CUDA to run the kernels that need no matrix unit on a processor: every thread is a
// coroutine, and whoever waits for others lets them go on.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static thread_local

using std::max;
using std::min;
struct float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3_ { int x, y, z; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline uint4 __ldg(const uint4* p) { return *p; }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned __ldg(const unsigned* p) { return *p; }

using half = _Float16;

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  int thread, block;
  bool done = false;
};

// A barrier that counts: the last to arrive lets all others go.
struct Meeting {
  int size, arrived = 0, round = 0;
};

inline ucontext_t scheduler;
inline Thread* current;
inline std::vector<std::unique_ptr<Thread>> threads;
inline dim3_ blockDim, gridDim;
inline std::map<std::pair<int, int>, Meeting> meetings;  // by kind and number
inline std::vector<float> exchanged;                      // one value a thread
inline std::vector<std::vector<float>> memories;          // shared memory of each block

struct Place_ {
  bool of_thread;
  struct Proxy {
    bool of_thread;
    operator int() const { return of_thread ? current->thread : current->block; }
  } x;
};
inline Place_ threadIdx{true, {true}}, blockIdx{false, {false}};

inline void give_way() { swapcontext(&current->context, &scheduler); }

inline void meet(int kind, int number, int size) {
  Meeting& meeting = meetings[{kind, number}];
  const int round = meeting.round;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  while (meetings[{kind, number}].round == round) give_way();
}

inline int warp_number() { return current->block * (blockDim.x / 32) + current->thread / 32; }
inline void __syncwarp() { meet(0, warp_number(), 32); }
inline void __syncthreads() { meet(1, current->block, blockDim.x); }

inline float __shfl_sync(unsigned, float value, int from) {
  const int base = current->block * blockDim.x + current->thread / 32 * 32;
  exchanged[base + current->thread % 32] = value;
  __syncwarp();
  const float result = exchanged[base + from % 32];
  __syncwarp();
  return result;
}
inline float __shfl_xor_sync(unsigned mask, float value, int other) {
  return __shfl_sync(mask, value, current->thread % 32 ^ other);
}

template <typename F>
void launch(int grid, int block, const F& kernel) {
  static std::function<void()> body;
  body = kernel;
  blockDim = {block, 1, 1};
  gridDim = {grid, 1, 1};
  threads.clear();
  meetings.clear();
  exchanged.assign(static_cast<size_t>(grid) * block, 0.0f);
  for (int i = 0; i < grid * block; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->thread = i % block;
    thread->block = i / block;
    thread->stack.resize(1 << 16);
    getcontext(&thread->context);
    thread->context.uc_stack.ss_sp = thread->stack.data();
    thread->context.uc_stack.ss_size = thread->stack.size();
    thread->context.uc_link = &scheduler;
    makecontext(&thread->context, +[] { body(); current->done = true; }, 0);
    threads.push_back(std::move(thread));
  }
  for (bool going = true; going;) {
    going = false;
    for (auto& thread : threads) {
      if (thread->done) continue;
      going = true;
      current = thread.get();
      swapcontext(&scheduler, &thread->context);
    }
  }
}

namespace mpt {

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr float LOG2_E = 1.4426950408889634f, HIDDEN = -1e30f;
inline float exp2_fast(float x) { return std::exp2(x); }
inline int cluster_size = 1;
inline void cluster_sync() { meet(2, current->block / cluster_size, cluster_size * blockDim.x); }

// Where a block keeps what others read: its own shared memory, or that of a neighbour.
inline float load_from(const float* p, u32 rank) {
  const auto& mine = memories[current->block];
  const auto& theirs = memories[current->block / cluster_size * cluster_size + rank];
  return theirs[p - mine.data()];
}

// A barrier in shared memory: who is still to arrive, how many bytes are under way, and its phase.
struct Barrier {
  u32 arrivals, missing, phase = 0;
  long long bytes = 0;
  void settle() {
    if (missing || bytes) return;
    missing = arrivals;
    phase ^= 1;
  }
};
inline std::map<u64*, Barrier> barriers;
inline void barrier_init(u64* barrier, u32 arrivals) { barriers[barrier] = {arrivals, arrivals}; }
inline void fence_barrier_init() {}
// Kernels run one after another here, and nobody reads ahead.
inline void previous_done() {}
inline void next_may_begin() {}
template <typename T>
T fresh(const T* p) {
  return *p;
}
inline void barrier_arrive(u64* barrier) {
  Barrier& b = barriers.at(barrier);
  if (!b.missing--) std::abort();
  b.settle();
}
inline void barrier_expect(u64* barrier, u32 bytes) {
  barriers.at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(u64* barrier, u32 parity) {
  while (barriers.at(barrier).phase == parity) give_way();
}
inline void arrived(u64* barrier, u32 bytes) {
  Barrier& b = barriers.at(barrier);
  b.bytes -= bytes;
  b.settle();
}
inline void load_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    std::fprintf(stderr, "a copy that the device refuses\n");
    std::abort();
  }
  std::memcpy(to, from, bytes);
  arrived(barrier, bytes);
}

template <typename T>
struct Pair {
  static u32 round(float x, float y) {
    T two[2] = {static_cast<T>(x), static_cast<T>(y)};
    u32 result;
    std::memcpy(&result, two, 4);
    return result;
  }
  static float2 widen(u32 both) {
    T two[2];
    std::memcpy(two, &both, 4);
    return {static_cast<float>(two[0]), static_cast<float>(two[1])};
  }
};

}  // namespace mpt
