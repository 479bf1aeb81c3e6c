// Attention of new tokens over a cache, which gets their keys and values in the same run.
//
// A cluster of eight blocks takes up to four queries of one head. Panels of 16 cached keys go to the
// warps of all eight in turn; keys of new tokens are read where the projection left them, so that
// nobody waits for what another block writes. Every warp keeps a running softmax; the parts are put
// together through the shared memory of the cluster, without scratch in global memory. Scores, numerators and sums are float32,
// the context is rounded once.
namespace mpt {

constexpr int SPLITS = 8, PAST_WARPS = 4, PANEL = 16, CHUNK = 4;

template <typename T>
struct PastArguments {
  const T *q, *k, *v;  // rows of new tokens, (batch, count, width) each
  int q_width, k_width, v_width, q_column, k_column, v_column;
  T* keys;    // (batch, kv_heads, panels, D, 16)
  T* values;  // (batch, kv_heads, panels * 16, D)
  const float* slopes;
  const int *lengths, *starts;
  T* out;  // (batch, count, heads * D)
  int count, panels, heads, kv_heads;
  float scale;
};

// One warp's share of the softmax of Q queries.
template <typename T, int D, int Q>
struct Share {
  // Lanes that hold one value together, eight features each, and values that a warp holds at once.
  static constexpr int EIGHTS = D / 8;
  static constexpr int LANES =
      EIGHTS > 16 ? 32 : EIGHTS > 8 ? 16 : EIGHTS > 4 ? 8 : EIGHTS > 2 ? 4 : 2;
  static constexpr int AT_ONCE = 32 / LANES, ROUNDS = PANEL / AT_ONCE;
  int lane;
  float top[Q], total[Q], o[Q][8];
  uint4 held[ROUNDS];

  __device__ __forceinline__ explicit Share(int lane) : lane(lane) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      top[q] = HIDDEN;
      total[q] = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) o[q][i] = 0.0f;
    }
  }

  // Load the values `from` to `to` - 1 of 16; the others are zero, whatever lies there.
  __device__ __forceinline__ void fetch(const T* v, size_t stride, int from, int to) {
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int key = i * AT_ONCE + lane / LANES, eight = lane % LANES;
      held[i] = make_uint4(0, 0, 0, 0);
      if (eight < EIGHTS && key >= from && key < to) {
        held[i] = fresh(reinterpret_cast<const uint4*>(v + key * stride + eight * 8));
      }
    }
  }

  // Take in scores, at most one a lane; returns the numerator.
  __device__ __forceinline__ float numerator(int q, float score) {
    float highest = fmaxf(score, top[q]);
#pragma unroll
    for (int other = 16; other; other >>= 1) {
      highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, other));
    }
    const float shrink = exp2_fast(top[q] - highest);
    const float p = score > 0.5f * HIDDEN ? exp2_fast(score - highest) : 0.0f;
    top[q] = highest;
    total[q] = fmaf(total[q], shrink, p);
#pragma unroll
    for (int i = 0; i < 8; ++i) o[q][i] *= shrink;
    return p;
  }

  // Weigh the values; `lane_of` says which lane has the numerator of a key.
  template <typename F>
  __device__ __forceinline__ void weigh(const float (&p)[Q], const F& lane_of) {
#pragma unroll
    for (int i = 0; i < ROUNDS; ++i) {
      const int from = lane_of(i * AT_ONCE + lane / LANES);
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const float weight = __shfl_sync(0xffffffffu, p[q], from);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 two = Pair<T>::widen(reinterpret_cast<const u32*>(held + i)[j]);
          o[q][2 * j] = fmaf(weight, two.x, o[q][2 * j]);
          o[q][2 * j + 1] = fmaf(weight, two.y, o[q][2 * j + 1]);
        }
      }
    }
  }

  // Add up what lanes hold of the same features, and write (Q, D + 2): context, top, total.
  __device__ __forceinline__ void write(float* to) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
#pragma unroll
      for (int other = 16; other; other >>= 1) {
        total[q] += __shfl_xor_sync(0xffffffffu, total[q], other);
        if (other < LANES) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i) o[q][i] += __shfl_xor_sync(0xffffffffu, o[q][i], other);
      }
      if (lane < EIGHTS) {
#pragma unroll
        for (int i = 0; i < 8; ++i) to[q * (D + 2) + lane * 8 + i] = o[q][i];
      }
      if (lane == 0) {
        to[q * (D + 2) + D] = top[q];
        to[q * (D + 2) + D + 1] = total[q];
      }
    }
  }
};

// Put parts of a softmax together: context `i` of query `q`, and its sum.
template <int D, int PARTS, typename F>
__device__ __forceinline__ float3 together(const F& part, int q, int i) {
  float top = HIDDEN, sum = 0.0f, total = 0.0f;
#pragma unroll
  for (int n = 0; n < PARTS; ++n) top = fmaxf(top, part(n, q * (D + 2) + D));
#pragma unroll
  for (int n = 0; n < PARTS; ++n) {
    const float shrink = exp2_fast(part(n, q * (D + 2) + D) - top);
    sum = fmaf(part(n, q * (D + 2) + i), shrink, sum);
    total = fmaf(part(n, q * (D + 2) + D + 1), shrink, total);
  }
  return make_float3(sum, top, total);
}

template <typename T, int D, int Q, bool ALIBI>
__device__ __forceinline__ void past_tile(const PastArguments<T>& a, int rank, int head, int tile,
                                          int batch, float* queries, float* parts, float* whole) {
  constexpr int PIECES = (D + 15) / 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = rank * PAST_WARPS + warp;
  const int kv_head = head / (a.heads / a.kv_heads);
  const int past = fresh(a.lengths + batch), start = max(fresh(a.starts + batch), 0);
  const int first = tile * Q, here = min(Q, a.count - first);
  const size_t row = static_cast<size_t>(batch) * a.count;
  const size_t stored = static_cast<size_t>(batch) * a.kv_heads + kv_head;
  T* keys = a.keys + stored * a.panels * PANEL * D;
  T* values = a.values + stored * a.panels * PANEL * D;
  const T* k = a.k + row * a.k_width + a.k_column + kv_head * D;
  const T* v = a.v + row * a.v_width + a.v_column + kv_head * D;
  const float slope = ALIBI ? a.slopes[head] * LOG2_E : 0.0f, scale = a.scale * LOG2_E;

  // A query alone leaves registers to ask early: for the first panel before the query is there, for
  // values with their keys, and for the next keys while values are weighed.
  constexpr bool EARLY = Q == 1;
  Share<T, D, Q> softmax(lane);
  uint4 pieces[PIECES];
  const auto fetch_keys = [&](int panel) {
    const T* from = keys + static_cast<size_t>(panel) * D * PANEL;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      pieces[i] = make_uint4(0, 0, 0, 0);
      if (i * 32 + lane < 2 * D) pieces[i] = fresh(reinterpret_cast<const uint4*>(from) + i * 32 + lane);
    }
  };
  const auto fetch_values = [&](int panel) {
    const int base = panel * PANEL;
    softmax.fetch(values + static_cast<size_t>(base) * D, D, start - base, past - base);
  };
  const int first_panel = start / PANEL + share;
  if (EARLY && first_panel * PANEL < past) {
    fetch_keys(first_panel);
    fetch_values(first_panel);
  }

  for (int i = threadIdx.x; i < Q * D / 2; i += PAST_WARPS * 32) {
    const int q = i / (D / 2), at = i % (D / 2) * 2;
    float2 two = make_float2(0.0f, 0.0f);
    if (q < here) {
      two = Pair<T>::widen(fresh(reinterpret_cast<const u32*>(
          a.q + (row + first + q) * a.q_width + a.q_column + head * D + at)));
    }
    queries[q * D + at] = two.x;
    queries[q * D + at + 1] = two.y;
  }
  __syncthreads();

  const auto score = [&](float dot, int key, int q) {
    const int query = past + first + q;
    const float bias = ALIBI ? slope * static_cast<float>(key - query) : 0.0f;
    return key >= start && key <= query ? fmaf(dot, scale, bias) : HIDDEN;
  };

  // Cached keys. A lane reads eight keys of one feature in 16; three exchanges later it has half of
  // the sum of one key, and a fourth makes it whole.
  float mine[Q][PIECES];
#pragma unroll
  for (int q = 0; q < Q; ++q) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int feature = i * 16 + lane / 2;
      mine[q][i] = feature < D ? queries[q * D + feature] : 0.0f;
    }
  }
  const int own = (lane & 1) * 8 + (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
  for (int panel = first_panel; panel * PANEL < past; panel += SPLITS * PAST_WARPS) {
    const int base = panel * PANEL, next = panel + SPLITS * PAST_WARPS;
    const bool ask = EARLY && next * PANEL < past;
    if (!EARLY) fetch_keys(panel);
    float p[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      float s[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) s[j] = 0.0f;
#pragma unroll
      for (int i = 0; i < PIECES; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 two = Pair<T>::widen(reinterpret_cast<const u32*>(pieces + i)[j]);
          s[2 * j] = fmaf(mine[q][i], two.x, s[2 * j]);
          s[2 * j + 1] = fmaf(mine[q][i], two.y, s[2 * j + 1]);
        }
      }
#pragma unroll
      for (int width = 4; width; width /= 2) {
        const bool upper = lane & 4 * width;
#pragma unroll
        for (int j = 0; j < width; ++j) {
          const float keep = upper ? s[j + width] : s[j], give = upper ? s[j] : s[j + width];
          s[j] = keep + __shfl_xor_sync(0xffffffffu, give, 4 * width);
        }
      }
      const float dot = s[0] + __shfl_xor_sync(0xffffffffu, s[0], 2);
      const int key = base + own;
      p[q] = softmax.numerator(q, lane & 2 || key >= past ? HIDDEN : score(dot, key, q));
    }
    if (!EARLY) fetch_values(panel);
    if (ask) fetch_keys(next);
    softmax.weigh(p, [](int key) {
      return (key >> 3 & 1) | (key >> 2 & 1) << 4 | (key >> 1 & 1) << 3 | (key & 1) << 2;
    });
    if (ask) fetch_values(next);
  }

  // New keys, 16 at a time, one after another by the whole warp; dealt from the other end.
  const int last = first + here;  // new tokens that some query here may see
  const int turn = SPLITS * PAST_WARPS - 1 - share;
  for (int group = turn * PANEL; group < last; group += SPLITS * PAST_WARPS * PANEL) {
    const int size = min(PANEL, last - group);
    softmax.fetch(v + static_cast<size_t>(group) * a.v_width, a.v_width, 0, size);
    float scores[Q], p[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) scores[q] = HIDDEN;
    for (int i = 0; i < size; ++i) {
      const T* from = k + static_cast<size_t>(group + i) * a.k_width;
      float dots[Q];
#pragma unroll
      for (int q = 0; q < Q; ++q) dots[q] = 0.0f;
#pragma unroll
      for (int at = 0; at < D; at += 64) {
        if (at + lane * 2 >= D) continue;
        const float2 two = Pair<T>::widen(fresh(reinterpret_cast<const u32*>(from + at + lane * 2)));
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          dots[q] = fmaf(queries[q * D + at + lane * 2], two.x, dots[q]);
          dots[q] = fmaf(queries[q * D + at + lane * 2 + 1], two.y, dots[q]);
        }
      }
#pragma unroll
      for (int q = 0; q < Q; ++q) {
#pragma unroll
        for (int other = 16; other; other >>= 1) {
          dots[q] += __shfl_xor_sync(0xffffffffu, dots[q], other);
        }
        if (lane == i) scores[q] = score(dots[q], past + group + i, q);
      }
    }
#pragma unroll
    for (int q = 0; q < Q; ++q) p[q] = softmax.numerator(q, scores[q]);
    softmax.weigh(p, [](int key) { return key; });
  }

  // One block stores what is new; slots from `past` on are read by nobody here.
  if (rank == SPLITS - 1 && head % (a.heads / a.kv_heads) == 0) {
    for (int i = threadIdx.x; i < here * D; i += PAST_WARPS * 32) {
      const int token = first + i / D, at = i % D, slot = past + token;
      if (slot >= a.panels * PANEL) continue;
      keys[(static_cast<size_t>(slot / PANEL) * D + at) * PANEL + slot % PANEL] =
          fresh(k + static_cast<size_t>(token) * a.k_width + at);
      values[static_cast<size_t>(slot) * D + at] =
          fresh(v + static_cast<size_t>(token) * a.v_width + at);
    }
  }
  softmax.write(parts + warp * Q * (D + 2));
  __syncthreads();
  const auto of_warp = [&](int n, int at) { return parts[n * Q * (D + 2) + at]; };
  for (int i = threadIdx.x; i < Q * D; i += PAST_WARPS * 32) {
    const int q = i / D, at = i % D;
    const float3 sum = together<D, PAST_WARPS>(of_warp, q, at);
    whole[q * (D + 2) + at] = sum.x;
    if (at == 0) {
      whole[q * (D + 2) + D] = sum.y;
      whole[q * (D + 2) + D + 1] = sum.z;
    }
  }
  cluster_sync();
  const auto of_block = [&](int n, int at) { return load_from(whole + at, n); };
  const int at = (rank * PAST_WARPS * 32 + threadIdx.x) * 2, q = at / D;
  if (q < here) {
    const float3 x = together<D, SPLITS>(of_block, q, at % D);
    const float3 y = together<D, SPLITS>(of_block, q, at % D + 1);
    // A query that sees nothing is padding.
    const float inverse = x.z > 0.0f ? 1.0f / x.z : 0.0f;
    *reinterpret_cast<u32*>(a.out + ((row + first + q) * a.heads + head) * D + at % D) =
        Pair<T>::round(x.x * inverse, y.x * inverse);
  }
  cluster_sync();  // nobody leaves while a neighbour still reads
}

template <typename T, int D, bool ALIBI>
__device__ __forceinline__ void attention_over_past(const PastArguments<T>& a) {
  static_assert(CHUNK * D <= SPLITS * PAST_WARPS * 32 * 2, "a thread writes two elements");
  __shared__ float queries[CHUNK * D], parts[PAST_WARPS * CHUNK * (D + 2)], whole[CHUNK * (D + 2)];
  const int rank = blockIdx.x % SPLITS, head = blockIdx.x / SPLITS % a.heads;
  const int rest = blockIdx.x / SPLITS / a.heads, tiles = (a.count + CHUNK - 1) / CHUNK;
  if (threadIdx.x == 0) next_may_begin();
  previous_done();
  if (a.count == 1) {
    past_tile<T, D, 1, ALIBI>(a, rank, head, 0, rest, queries, parts, whole);
  } else {
    past_tile<T, D, CHUNK, ALIBI>(a, rank, head, rest % tiles, rest / tiles, queries, parts, whole);
  }
}

}  // namespace mpt
