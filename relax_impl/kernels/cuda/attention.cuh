// Causal attention with ALiBi: a block takes 128 queries of one head, two warpgroups 64 each, while
// one thread fetches keys and values ahead, 128 at a time, from the diagonal back to the first.
//
// Scores and softmax are float32 in base 2. A numerator is rounded to the storage dtype before it
// weighs a value, as the matrix unit wants it; the sum of numerators is not. The context is rounded
// once. The product of the next keys runs while the current values are weighed.
namespace mpt {

constexpr int QUERIES = 128, KEYS = 128, FETCHED = 2;

template <typename T, int D, bool ALIBI>
struct Softmax {
  float scale;  // of q.k, times log2(e)
  float slope;  // times log2(e)
  int lane, query, first;  // query: position of this thread's first row; first: of the warpgroup's
  float top[2] = {HIDDEN, HIDDEN}, total[2] = {0.0f, 0.0f}, shrink[2];

  // Turn the scores of the keys from `key` on into numerators; `shrink` is what older ones shrink by.
  __device__ __forceinline__ void operator()(float (&s)[KEYS / 2], int key) {
    key += lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float near = ALIBI ? slope * static_cast<float>(key - query - 8 * i) : 0.0f;
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          float bias = ALIBI ? fmaf(slope, static_cast<float>(j * 8 + v), near) : 0.0f;
          s[j * 4 + i * 2 + v] = fmaf(s[j * 4 + i * 2 + v], scale, bias);
        }
      }
    }
    if (key - lane % 4 * 2 + KEYS - 1 > first) {
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            if (key + j * 8 + v > query + 8 * i) s[j * 4 + i * 2 + v] = HIDDEN;
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float highest = top[i];
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j) {
        highest = fmaxf(highest, fmaxf(s[j * 4 + i * 2], s[j * 4 + i * 2 + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
      shrink[i] = exp2_fast(top[i] - highest);
      top[i] = highest;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < KEYS / 8; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          float p = exp2_fast(s[j * 4 + i * 2 + v] - highest);
          s[j * 4 + i * 2 + v] = p;
          sum += p;
        }
      }
      total[i] = fmaf(total[i], shrink[i], sum);
    }
  }

  __device__ __forceinline__ float inverse(int i) const {
    float sum = total[i] + __shfl_xor_sync(0xffffffffu, total[i], 1);
    return 1.0f / (sum + __shfl_xor_sync(0xffffffffu, sum, 2));
  }
};

template <typename T, int D, bool ALIBI>
__device__ __forceinline__ void attention(u64 q_map, u64 k_map, u64 v_map, const float* slopes,
                                          T* out, int sq, int sk, int group_size, int q_column,
                                          int k_column, int v_column, float scale,
                                          unsigned char* shared) {
  constexpr int PANELS = (D + 63) / 64;  // boxes of 64 columns
  constexpr int PANEL_BYTES = KEYS * 128, BYTES = PANELS * PANEL_BYTES;
  static_assert(QUERIES == KEYS, "one size of box");
  unsigned char* q_shared = shared;
  unsigned char* k_shared = q_shared + BYTES;
  unsigned char* v_shared = k_shared + FETCHED * BYTES;
  u64* q_full = reinterpret_cast<u64*>(v_shared + FETCHED * BYTES);
  u64* k_full = q_full + 1;
  u64* v_full = k_full + FETCHED;
  u64* k_empty = v_full + FETCHED;
  u64* v_empty = k_empty + FETCHED;
  const int group = threadIdx.x / 128;
  const int head = blockIdx.x, batch = blockIdx.z;
  const int tile = gridDim.y - 1 - blockIdx.y;  // the longest first
  const int past = sk - sq;
  const int last = min(tile * QUERIES + QUERIES, sq) - 1 + past;  // the last key that is visible
  const int steps = last / KEYS + 1;

  if (threadIdx.x == 0) {
    barrier_init(q_full, 1);
    for (int i = 0; i < FETCHED; ++i) {
      barrier_init(k_full + i, 1);
      barrier_init(v_full + i, 1);
      barrier_init(k_empty + i, 2);
      barrier_init(v_empty + i, 2);
    }
    fence_barrier_init();
    next_may_begin();
  }
  previous_done();
  __syncthreads();

  if (group == 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      const int kv = head / group_size * D;
      barrier_expect(q_full, BYTES);
      for (int i = 0; i < PANELS; ++i) {
        load_box(q_shared + i * PANEL_BYTES, q_map, q_column + head * D + i * 64, tile * QUERIES,
                 batch, q_full);
      }
      Ring<FETCHED> ring;
      for (int step = 0; step < steps; ++step, ring.advance()) {
        const int key = (steps - 1 - step) * KEYS;
        unsigned char* k_to = k_shared + ring.stage * BYTES;
        unsigned char* v_to = v_shared + ring.stage * BYTES;
        barrier_wait(k_empty + ring.stage, ring.phase ^ 1);
        barrier_expect(k_full + ring.stage, BYTES);
        for (int i = 0; i < PANELS; ++i) {
          load_box(k_to + i * PANEL_BYTES, k_map, k_column + kv + i * 64, key, batch,
                   k_full + ring.stage);
        }
        barrier_wait(v_empty + ring.stage, ring.phase ^ 1);
        barrier_expect(v_full + ring.stage, BYTES);
        for (int i = 0; i < PANELS; ++i) {
          load_box(v_to + i * PANEL_BYTES, v_map, v_column + kv + i * 64, key, batch,
                   v_full + ring.stage);
        }
      }
    }
    return;
  }

  more_registers<240>();
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool leader = threadIdx.x % 128 == 0;
  const int row = tile * QUERIES + (group - 1) * 64 + warp * 16 + lane / 4;
  const u64 q = descriptor(q_shared + (group - 1) * 64 * 128), k = descriptor(k_shared);
  const u64 v = descriptor(v_shared, PANEL_BYTES);
  Softmax<T, D, ALIBI> softmax{scale * LOG2_E, ALIBI ? slopes[head] * LOG2_E : 0.0f, lane,
                               row + past, tile * QUERIES + (group - 1) * 64 + past};
  float o[D / 2], s[KEYS / 2];
  u32 p[KEYS / 4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;

  auto scores = [&](int stage) {
#pragma unroll
    for (int part = 0; part < D / 16; ++part) {
      const int at = part / 4 * (PANEL_BYTES / 16) + part % 4 * 2;
      Wgmma<T, KEYS>::from_shared(s, q + at, k + stage * (BYTES / 16) + at, part);
    }
    products_commit();
  };
  auto weigh = [&](int stage) {
#pragma unroll
    for (int part = 0; part < KEYS / 16; ++part) {
      Wgmma<T, D>::from_registers(o, p[part * 4], p[part * 4 + 1], p[part * 4 + 2],
                                  p[part * 4 + 3],
                                  v + stage * (BYTES / 16) + part * (16 * 128 / 16));
    }
    products_commit();
  };
  auto pack = [&]() {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) p[i] = Pair<T>::round(s[2 * i], s[2 * i + 1]);
  };

  // The warpgroups take turns at the matrix unit, so that one's softmax runs beside the other's
  // products.
  Ring<FETCHED> keys, values;
  if (group == 2) turn_pass(1);
  barrier_wait(q_full, 0);
  barrier_wait(k_full, 0);
  turn_wait(group);
  products_begin();
  scores(0);
  if (group == 1 || steps > 1) turn_pass(3 - group);
  products_wait<0>();
  if (leader) barrier_arrive(k_empty);
  softmax(s, (steps - 1) * KEYS);
  pack();
  for (int step = 1; step < steps; ++step) {
    keys.advance();
    barrier_wait(k_full + keys.stage, keys.phase);
    barrier_wait(v_full + values.stage, values.phase);
    turn_wait(group);
    products_begin();
    scores(keys.stage);
    weigh(values.stage);
    if (group == 1 || step + 1 < steps) turn_pass(3 - group);
    products_wait<1>();
    if (leader) barrier_arrive(k_empty + keys.stage);
    softmax(s, (steps - 1 - step) * KEYS);
    products_wait<0>();
    if (leader) barrier_arrive(v_empty + values.stage);
    values.advance();
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= softmax.shrink[i / 2 % 2];
    pack();
  }
  barrier_wait(v_full + values.stage, values.phase);
  products_begin();
  weigh(values.stage);
  products_wait<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float inverse = softmax.inverse(i);
    if (row + 8 * i >= sq) continue;
    T* to = out + ((static_cast<size_t>(batch) * sq + row + 8 * i) * gridDim.x + head) * D;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<u32*>(to + j * 8 + lane % 4 * 2) =
          Pair<T>::round(o[j * 4 + i * 2] * inverse, o[j * 4 + i * 2 + 1] * inverse);
    }
  }
}

}  // namespace mpt
