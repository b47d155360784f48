// The table of isa.h in plain C++ with the vector types of gcc and clang. Included by one file per instruction set, which sets
// TMM_LANES (32-bit lanes of a register) and may provide an int16 rung.
#include "isa.h"

namespace tmm {
namespace {

constexpr int kLanes = TMM_LANES, kVectors = 2, kPanel = kLanes * kVectors;

typedef float Floats __attribute__((vector_size(4 * TMM_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * TMM_LANES)));

template <class V>
inline __attribute__((always_inline)) V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline __attribute__((always_inline)) void save(void* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
inline __attribute__((always_inline)) Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// Shared shape of a scan: `Rung` says how a bias becomes an accumulator, how a step is added and how sums become ordered ints.
template <class Rung>
void scan(const ScanArgs& args) {
  using V = typename Rung::V;
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const int32_t* codes = static_cast<const int32_t*>(args.codes) + panel * args.steps * kPanel;
    const float* bias = args.bias + panel * kPanel;
    Rung::make_table(args, bias);
    const bool first = panel % args.span == 0;
    for (int64_t tile = 0; tile < args.tiles; ++tile) {
      const int32_t* token = args.tokens + tile * args.steps * kTileRows;
      V sum[kTileRows][kVectors];
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const void* start = Rung::start(args, bias, tile * kTileRows + r);
        sum[r][0] = load<V>(start);
        sum[r][1] = load<V>(static_cast<const char*>(start) + sizeof(V));
      }
      const int32_t* code = codes;
      for (int64_t step = 0; step < args.steps; ++step, code += kPanel, token += kTileRows) {
        const V c0 = load<V>(code), c1 = load<V>(code + kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r) {
          const V t = Rung::broadcast(token + r);
          sum[r][0] = Rung::add(sum[r][0], c0, t);
          sum[r][1] = Rung::add(sum[r][1], c1, t);
        }
      }
      int32_t* out = args.groups + tile * kTileRows * args.group_stride + panel / args.span * kLanes;
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r, out += args.group_stride) {
        Ints top = Rung::top(sum[r][0], sum[r][1]);
        if (!first) top = larger(top, load<Ints>(out));
        save(out, top);
      }
    }
  }
}

struct FloatRung {
  using V = Floats;
  static void make_table(const ScanArgs&, const float*) {}
  static const void* start(const ScanArgs&, const float* bias, int64_t) { return bias; }
  static inline __attribute__((always_inline)) V broadcast(const int32_t* token) {
    float value;
    __builtin_memcpy(&value, token, 4);
    return value - Floats{};
  }
  static inline __attribute__((always_inline)) V add(V sum, V code, V token) { return TMM_MULTIPLY_ADD(code, token, sum); }
  static inline __attribute__((always_inline)) Ints top(V a, V b) {  // float32 bits to an integer of the same order
    const Ints bits = (Ints)(a > b ? a : b);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }
};

// Minus the sum of squared differences.
struct DifferenceRung : FloatRung {
  static inline __attribute__((always_inline)) V add(V sum, V code, V token) {
    const V gap = code - token;
    return sum - gap * gap;
  }
};

inline float magnitude(float x) { return x < 0 ? -x : x; }

template <class T>
RowStats centre(const T* row, const float* mean, float scale, int64_t d, float* out) {
  float largest = 0;
  double sums[8] = {};
  int64_t i = 0;
  const auto add = [&](int64_t j, int lane) {
    const double gap = static_cast<double>(row[j]) - static_cast<double>(mean[j]);
    sums[lane] += gap * gap;
    out[j] = static_cast<float>(gap * static_cast<double>(scale));
    const float size = magnitude(out[j]);
    largest = size > largest ? size : largest;
  };
  for (; i + 8 <= d; i += 8)
    for (int lane = 0; lane < 8; ++lane) add(i + lane, lane);
  for (; i < d; ++i) add(i, static_cast<int>(i % 8));
  for (; i % 16; ++i) out[i] = 0;
  double norm2 = 0;
  for (double sum : sums) norm2 += sum;
  return {largest, norm2};
}

template <class Q>
QuantStats quantise(const float* x, int64_t padded, float scale, void* out) {
  const float inverse = 1.0f / scale;
  Q* q = static_cast<Q*>(out);
  float residual2[8] = {};
  int32_t sum = 0;
  for (int64_t i = 0; i < padded; i += 8)
    for (int lane = 0; lane < 8; ++lane) {
      const float value = x[i + lane] * inverse;
      const int32_t rounded = static_cast<int32_t>(value + (value < 0 ? -0.5f : 0.5f));
      const float residual = x[i + lane] - static_cast<float>(rounded) * scale;
      q[i + lane] = static_cast<Q>(rounded);
      residual2[lane] += residual * residual;
      sum += rounded;
    }
  float total = 0;
  for (float part : residual2) total += part;
  return {total, sum};
}

int32_t largest(const int32_t* values, int64_t n, bool two) {
  Ints top = load<Ints>(values);
  for (int64_t i = kLanes; i < n; i += kLanes) top = larger(top, load<Ints>(values + i));
  int32_t first = top[0], second = INT32_MIN;
  for (int lane = 1; lane < kLanes; ++lane) {
    const int32_t value = top[lane], less = value < first ? value : first;
    second = less > second ? less : second;
    first = value > first ? value : first;
  }
  return two ? second : first;
}

int64_t collect(const int32_t* values, int64_t n, int32_t threshold, int32_t* out, int64_t capacity) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const Ints hit = load<Ints>(values + i) >= threshold;
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= hit[lane];
    if (!any) continue;
    for (int lane = 0; lane < kLanes; ++lane)
      if (hit[lane]) {
        if (count < capacity) out[count] = static_cast<int32_t>(i + lane);
        ++count;
      }
  }
  return count;
}

template <class T>
bool distances(const T* z, const T* codes, int64_t n, int64_t d, double, double* out) {
  for (int64_t c = 0; c < n; ++c, codes += d) {
    double sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= d; i += 8)
      for (int lane = 0; lane < 8; ++lane) {
        const double gap = static_cast<double>(z[i + lane]) - static_cast<double>(codes[i + lane]);
        sum[lane] += gap * gap;
      }
    for (int lane = 0; i < d; ++i, ++lane) {
      const double gap = static_cast<double>(z[i]) - static_cast<double>(codes[i]);
      sum[lane] += gap * gap;
    }
    const double d2 = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    out[c] = d2 < __builtin_inf() ? d2 : __builtin_inf();
  }
  return true;
}

template <class T>
void score(const T* z, const T* codes, int64_t n, int64_t d, int64_t first, Best* best) {
  for (int64_t c = 0; c < n; ++c) {
    double d2;
    distances(z, codes + c * d, 1, d, 0, &d2);
    if (d2 < best->distance || (d2 == best->distance && first + c < best->index)) *best = {d2, first + c};
  }
}

// Squared distances from z to 16 boxes (bounds [2][dim][kLeaf]) or to 16 codes ([dim][kLeaf]).
inline void box_bounds(const float* bounds, const float* z, int dim, float* out) {
  for (int lane = 0; lane < kLeaf; ++lane) out[lane] = 0;
  for (int j = 0; j < dim; ++j)
    for (int lane = 0; lane < kLeaf; ++lane) {
      const float below = bounds[j * kLeaf + lane] - z[j], above = z[j] - bounds[(dim + j) * kLeaf + lane];
      const float outside = below > above ? below : above, gap = outside > 0 ? outside : 0;
      out[lane] += gap * gap;
    }
}

inline void leaf_distances(const float* codes, const float* z, int dim, float* out) {
  for (int lane = 0; lane < kLeaf; ++lane) out[lane] = 0;
  for (int j = 0; j < dim; ++j)
    for (int lane = 0; lane < kLeaf; ++lane) {
      const float gap = z[j] - codes[j * kLeaf + lane];
      out[lane] += gap * gap;
    }
}

struct TreeSearch {
  const TreeView& tree;
  const float* z;
  bool two;
  float first, best, reach;  // smallest float32 distance so far; it or, with `two`, the second; reach = best * slack
  int32_t* slots;     // provisional candidates and their distances
  float* found;
  int64_t capacity, count;

  void score(int64_t leaf) {
    float value[kLeaf];
    leaf_distances(tree.leaf_codes + leaf * tree.dim * kLeaf, z, tree.dim, value);
    for (int lane = 0; lane < kLeaf; ++lane) {
      if (!(value[lane] <= reach)) continue;
      if (value[lane] < best) {
        best = !two ? value[lane] : value[lane] < first ? first : value[lane];
        first = value[lane] < first ? value[lane] : first;
        reach = best * tree.slack;
      }
      if (count < capacity) {
        slots[count] = static_cast<int32_t>(leaf * kLeaf + lane);
        found[count] = value[lane];
      }
      ++count;
    }
  }

  void super(int64_t box, int64_t skip) {
    float value[kLeaf];
    box_bounds(tree.leaf_bounds + box * 2 * tree.dim * kLeaf, z, tree.dim, value);
    for (int lane = 0; lane < kLeaf; ++lane)
      if (value[lane] <= reach && box * kLeaf + lane != skip) score(box * kLeaf + lane);
  }
};

int64_t tree_candidates(const TreeView& tree, const float* z, bool two, float* scratch, int32_t* out, int64_t capacity) {
  const int dim = tree.dim;
  const int64_t blocks = (tree.supers + kLeaf - 1) / kLeaf;
  int64_t home = -1;
  for (int64_t b = 0; b < blocks; ++b) box_bounds(tree.super_bounds + b * 2 * dim * kLeaf, z, dim, scratch + b * kLeaf);
  for (int64_t box = 0; box < tree.supers; ++box)
    if (scratch[box] < (home < 0 ? __builtin_inff() : scratch[home])) home = box;
  if (home < 0) return -1;
  float value[kLeaf];
  box_bounds(tree.leaf_bounds + home * 2 * dim * kLeaf, z, dim, value);
  int start = 0;
  for (int lane = 1; lane < kLeaf; ++lane) start = value[lane] < value[start] ? lane : start;
  TreeSearch search{tree, z, two, __builtin_inff(), __builtin_inff(), __builtin_inff(), out, scratch + blocks * kLeaf, capacity, 0};
  search.score(home * kLeaf + start);
  search.super(home, home * kLeaf + start);
  for (int64_t box = 0; box < tree.supers; ++box)
    if (scratch[box] <= search.reach && box != home) search.super(box, -1);
  if (!(search.best > 1e-30f) || !(search.best < 1e30f)) return -1;
  if (search.count > capacity) return search.count;
  int64_t kept = 0;
  for (int64_t i = 0; i < search.count; ++i)
    if (search.found[i] <= search.reach) out[kept++] = out[i];
  return kept;
}

}  // namespace
}  // namespace tmm
