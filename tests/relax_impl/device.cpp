// The kernels of a decode step, norms and matrix products, as functions of a library; see device.hpp.
#include "device.hpp"
#include "device_matrix.hpp"

#include "finish.cuh"
#include "few.cuh"
#include "tiles.cuh"
#include "gemm.cuh"
#include "norm.cuh"
#include "past.cuh"

namespace {

struct Plain {
  const half* residual;
  int n;
  mpt::u32 load(int row, int column) const {
    mpt::u32 two;
    std::memcpy(&two, residual + row * n + column, 4);
    return two;
  }
  float2 operator()(float x, float y, mpt::u32 addend, int) const {
    const float2 r = mpt::Pair<half>::widen(addend);
    return {x + r.x, y + r.y};
  }
};

template <int D>
void past(const mpt::PastArguments<half>& a, int blocks) {
  using namespace mpt;
  cluster_size = SPLITS;
  constexpr int QUERIES = CHUNK * D, PARTS = PAST_WARPS * CHUNK * (D + 2), WHOLE = CHUNK * (D + 2);
  memories.assign(blocks, std::vector<float>(QUERIES + PARTS + WHOLE, NAN));
  launch(blocks, PAST_WARPS * 32, [&] {
    float* queries = memories[current->block].data();
    float *parts = queries + QUERIES, *whole = parts + PARTS;
    const int rank = current->block % SPLITS, head = current->block / SPLITS % a.heads;
    const int rest = current->block / SPLITS / a.heads, tiles = (a.count + CHUNK - 1) / CHUNK;
    if (a.count == 1) {
      past_tile<half, D, 1, true>(a, rank, head, 0, rest, queries, parts, whole);
    } else {
      past_tile<half, D, CHUNK, true>(a, rank, head, rest % tiles, rest / tiles, queries, parts, whole);
    }
  });
}

}  // namespace

extern "C" int attend(const half* q, const half* k, const half* v, const int* layout, half* keys,
                      half* values, const float* slopes, const int* lengths, const int* starts,
                      half* out, int batch, int count, int panels, int heads, int kv_heads, int dim,
                      float scale) {
  const mpt::PastArguments<half> a{q, k, v, layout[0], layout[1], layout[2], layout[3], layout[4],
                                   layout[5], keys, values, slopes, lengths, starts, out, count,
                                   panels, heads, kv_heads, scale};
  const int blocks = mpt::SPLITS * heads * batch * ((count + mpt::CHUNK - 1) / mpt::CHUNK);
  if (dim == 8) past<8>(a, blocks);
  else if (dim == 64) past<64>(a, blocks);
  else if (dim == 72) past<72>(a, blocks);
  else if (dim == 80) past<80>(a, blocks);
  else if (dim == 112) past<112>(a, blocks);
  else if (dim == 128) past<128>(a, blocks);
  else if (dim == 256) past<256>(a, blocks);
  else return 1;
  return 0;
}

extern "C" int multiply(const half* a, const half* b, const half* residual, half* c, int m, int n,
                        int k, int blocks, int shared_bytes) {
  if (mpt::few_stages(m, k, shared_bytes) < mpt::FEWEST_STAGES) return 1;
  std::vector<std::vector<uint4>> shared(blocks, std::vector<uint4>(shared_bytes / 16));
  const Plain finish{residual, n};
  launch(blocks, 384, [&] {
    auto* memory = reinterpret_cast<unsigned char*>(shared[current->block].data());
    if (m == 1) mpt::few_rows<1, half, half>(a, b, c, finish, n, k, memory, shared_bytes);
    if (m == 2) mpt::few_rows<2, half, half>(a, b, c, finish, n, k, memory, shared_bytes);
    if (m == 3) mpt::few_rows<3, half, half>(a, b, c, finish, n, k, memory, shared_bytes);
    if (m == 4) mpt::few_rows<4, half, half>(a, b, c, finish, n, k, memory, shared_bytes);
  });
  return 0;
}

// The whole product with a bias and a stream.
extern "C" int product(half* a, half* b, const half* bias, const half* residual, half* c, int m,
                       int n, int k, int blocks) {
  using namespace mpt;
  cluster_size = 2;
  barriers.clear();
  products.clear();
  std::vector<std::unique_ptr<unsigned char[]>> shared;
  bases.clear();
  for (int i = 0; i < blocks; ++i) {
    shared.emplace_back(new unsigned char[SHARED_BYTES + 1024]);
    std::memset(shared.back().get(), 0x7e, SHARED_BYTES + 1024);
    const auto address = reinterpret_cast<uintptr_t>(shared.back().get());
    bases.push_back(reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024));
  }
  const auto map = [](half* data, int width, int height, int rows) {
    return Map{reinterpret_cast<unsigned char*>(data), width, height, 2, 64, rows};
  };
  const Map of_few = map(a, k, m, 8);
  const Map of_a = map(a, k, m, 128), of_half = map(a, k, m, 64), of_b = map(b, k, n, 128);
  const Map of_part = map(b, k, n, 32), of_c = map(c, n, m, 64);
  const auto u = [](const Map& map) { return reinterpret_cast<u64>(&map); };
  launch(blocks, 384, [&] {
    gemm<half, half, true, false, false, true>(u(of_a), u(of_half), u(of_few), u(of_b), u(of_part),
                                               u(of_c), a, b, c, bias, residual, m, n, k, blocks,
                                               0.0f, bases[current->block]);
  });
  return 0;
}

// Number of the shape that is chosen.
extern "C" int chosen(int m, int n, int k, int blocks) {
  return mpt::choice(mpt::Problem{m, n, k, 0, 0, blocks / 2, nullptr});
}

// One block at a time, for what a block shares is here shared by all.
template <int WIDTH>
void rows_of(const half* x, const half* weight, const half* bias, half* out, int rows) {
  const int each = WIDTH < mpt::LONG_ROW ? mpt::NORM_WARPS : 1;
  for (int first = 0; first < rows; first += each) {
    launch(1, mpt::NORM_WARPS * 32, [&] {
      mpt::norm<half, WIDTH, false, true>(x + first * WIDTH, weight, bias, out + first * WIDTH,
                                          min(each, rows - first), 1e-5f);
    });
  }
}

extern "C" int normalise(const half* x, const half* weight, const half* bias, half* out, int rows,
                         int width) {
  if (width == 96) rows_of<96>(x, weight, bias, out, rows);
  else if (width == 1000) rows_of<1000>(x, weight, bias, out, rows);
  else if (width == 4096) rows_of<4096>(x, weight, bias, out, rows);
  else if (width == 7168) rows_of<7168>(x, weight, bias, out, rows);
  else return 1;
  return 0;
}
