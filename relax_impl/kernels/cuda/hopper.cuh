// Hopper's instructions by name: barriers in shared memory, bulk tensor copies, matrix products of a
// warpgroup. `u64 map` is the address of a CUtensorMap among the kernel's parameters.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mpt {

using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- barriers ----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Arrive, and expect so many bytes of copies before the phase ends.
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrive at the same barrier of another block of the cluster. Without `.release.cluster`, which waits
// for all memory traffic of the thread: what was read here, matrix products read, and they are over.
__device__ __forceinline__ void barrier_arrive_at(u64* barrier, u32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// Arrive at another block's barrier once that block may see what this thread has stored there, ...
__device__ __forceinline__ void barrier_hand_over(u64* barrier, u32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// ... and wait for that.
__device__ __forceinline__ void barrier_take_over(u64* barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Makes ordinary stores to shared memory visible to bulk copies and matrix products.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// What another block of the cluster holds at the place where this one has `p`.
__device__ __forceinline__ float load_from(const float* p, u32 rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [remote];\n"
      "}"
      : "=f"(value)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return value;
}

// Store in another block of the cluster at the place where this one has `p`.
__device__ __forceinline__ void store_at(float* p, u32 rank, float value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.f32 [remote], %2;\n"
      "}" ::"r"(shared_address(p)),
      "r"(rank), "f"(value)
      : "memory");
}

// A barrier of the 128 threads of one warpgroup; `name` is 1 to 15.
__device__ __forceinline__ void group_sync(u32 name) {
  asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory");
}

// Take turns: wait at a barrier of two warpgroups, or let the one that waits there go.
__device__ __forceinline__ void turn_wait(u32 name) {
  asm volatile("bar.sync %0, 256;" ::"r"(name) : "memory");
}

__device__ __forceinline__ void turn_pass(u32 name) {
  asm volatile("bar.arrive %0, 256;" ::"r"(name) : "memory");
}

template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The slots of a ring of buffers: which one is next, and the parity of its barrier.
template <int STAGES>
struct Ring {
  int stage = 0;
  u32 phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// ---- kernels in a row --------------------------------------------------------------------------

// A kernel may begin while the one before it ends (programmatic dependent launch). What it does before
// `previous_done` touches nothing that a kernel writes: it asks for weights. A kernel is over only when
// all its threads are, and some have waited; so with the one before, all before that are over, too, and
// `next_may_begin` may come at any time.
__device__ __forceinline__ void previous_done() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void next_may_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Read what a kernel has written. Through a plain pointer that is only read from, the compiler might
// do so before `previous_done`: it takes such memory for constant.
__device__ __forceinline__ u32 fresh(const u32* p) {
  u32 x;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(p)));
  return x;
}

__device__ __forceinline__ uint4 fresh(const uint4* p) {
  uint4 x;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(p)));
  return x;
}

__device__ __forceinline__ int fresh(const int* p) {
  return static_cast<int>(fresh(reinterpret_cast<const u32*>(p)));
}

template <typename T>  // half or __nv_bfloat16
__device__ __forceinline__ T fresh(const T* p) {
  static_assert(sizeof(T) == 2, "the other sizes are above");
  unsigned short x;
  asm volatile("ld.global.b16 %0, [%1];" : "=h"(x) : "l"(__cvta_generic_to_global(p)));
  return *reinterpret_cast<T*>(&x);
}

// ---- bulk tensor copies ------------------------------------------------------------------------

__device__ __forceinline__ void load_box(void* to, u64 map, int x, int y, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void load_box(void* to, u64 map, int x, int y, int z, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Into the same place of every block of the cluster whose bit is set.
__device__ __forceinline__ void load_box_everywhere(void* to, u64 map, int x, int y, u64* barrier,
                                                    unsigned short blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

// `bytes`, a multiple of 16, from one place to another.
__device__ __forceinline__ void load_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// What lies beyond the tensor is not written.
__device__ __forceinline__ void store_box(u64 map, const void* from, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(x), "r"(y)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Wait until at most `PENDING` stores still read shared memory.
template <int PENDING>
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// ---- matrix products ---------------------------------------------------------------------------

// Operand in shared memory in rows of 128 bytes, swizzled as the copies leave it. `panel` is the
// distance between two panels of 64 elements along the rows, in bytes (only where the rows run along
// m or n).
__device__ __forceinline__ u64 descriptor(const void* p, u32 panel = 16) {
  constexpr u64 EIGHT_ROWS = 8 * 128 / 16, SWIZZLE_128 = u64(1) << 62;
  return (u64(shared_address(p) & 0x3FFFF) >> 4) | (u64(panel >> 4) << 16) | (EIGHT_ROWS << 32) |
         SWIZZLE_128;
}

__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// ---- storage dtypes ----------------------------------------------------------------------------

template <typename T>
struct Pair;

template <>
struct Pair<half> {
  static __device__ __forceinline__ u32 round(float x, float y) {
    half2 two = __floats2half2_rn(x, y);
    return *reinterpret_cast<u32*>(&two);
  }
  static __device__ __forceinline__ float2 widen(u32 two) {
    return __half22float2(*reinterpret_cast<half2*>(&two));
  }
};

template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ u32 round(float x, float y) {
    __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<u32*>(&two);
  }
  static __device__ __forceinline__ float2 widen(u32 two) {
    return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&two));
  }
};

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float HIDDEN = -1e30f;  // score of a key that is not seen

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace mpt
