// The arithmetic of the exact nearest-code search that device code and host tests share: rounding to fp16, the packed
// columns, the error bound, candidate records and the merge. Plain C++17: it compiles with and without nvcc.
//
// The certificate
// ---------------
// With any shift mu, x = z - mu and c_k' = c_k - mu, the nearest code maximises s_k = x.c_k' - ||c_k'||^2 / 2, since
// ||z - c_k||^2 = ||x||^2 - 2 s_k. The pass computes, in fp16 with fp32 accumulation, an UPPER bound of s_k:
//
//   X = 2^i x, C_k = 2^k c_k'          scaled by powers of two: k one per codebook, i <= k one per row, e = k - i
//   X = x^ + dX, C_k = c^ + dC         x^, c^ in fp16
//   |X.C - x^.c^| <= ||dX|| ||C|| + ||x^|| ||dC||                                            (Cauchy-Schwarz)
//
// Every norm on the right is measured in double precision and rounded up to fp16, so the bound is itself a sum of
// products of a row value and a code value, and rides along as extra columns of the matrix product, as do the bias
// -||C||^2 / 2 and an offset T. The rounding of the matrix unit is bounded code by code too: it is at most gamma Q_k,
// Q_k the sum of the absolute products of code k, and Q_k is again such a sum; it enlarges alpha and a and shrinks
// the bias (a factor 1 - 1.01 gamma).
//
//   column     row value             code value
//   0 .. D-1   x^                    c^
//   D .. D+2   2^(12-e), 2^(1-e),    h1, h2, h3: the bias over 2^12 split in three halves, each 2^11 finer
//              2^(-10-e)
//   D+3        alpha >= ||dX|| + gamma (||x^|| + alpha)          n >= ||C||
//   D+4        a >= ||x^|| + gamma (||x^|| + a)                  rho >= ||dC||
//   D+5        tau, T = 2^15 tau     2^15
//
// If u_k is what the matrix unit returns for code k, then 2^(i+k) s_k <= u_k - T + slack, where slack (a row value)
// covers the rest of the bias and gamma T. Let d* be the distance of ANY code, computed in double precision, and S* =
// 2^(i+k) (||x||^2 - d*) / 2 less its rounding. A code with u_k - T + slack < S* is farther than that code and cannot
// be the answer, not even through a rounding tie. All others are scored in double precision.
//
// T lets the pass compare the bits of floats as integers, where negative ones are below all others but otherwise out
// of order. The code of the smallest norm m scores at least -L, L = ||X|| m + 2^-e m^2 / 2, so the best score is at
// least -L, and with T >= L + slack and the rounding of S* a code with u_k < 0 cannot be the answer. A code that must
// never be chosen is packed as zeros: u = 0. No bound mentions the largest norm, so a few large codes do not spoil
// the rest.
//
// Because the final choice is the minimum over (double-precision distance, index), the result does not depend on mu,
// tiles, splits, the kernel used or the order of the merge.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_nearest.h"

#if defined(__CUDACC__)
#define TMM_HD __host__ __device__ __forceinline__
#define TMM_UNROLL _Pragma("unroll 4")
#else
#define TMM_HD inline
#define TMM_UNROLL
#endif

namespace tmm {

constexpr int kExtra = 6;         // columns beside the D values
constexpr int kGroup = 16;        // codes that share one maximum: one lane's share of a span
constexpr int kSpan = 64;         // codes of a span: 4 lanes of a quad, 16 codes each
constexpr int kLanes = 4;         // candidate streams per row and segment: the lanes of a quad
constexpr int kTile = 256;        // codes of a tile; packed codebooks are padded to it
constexpr int kRowTile = 128;     // rows of a tile
constexpr int kParts = 8;         // partial sums of a distance, one per lane
constexpr int kMaxWidth = 16384;  // wider rows take the exact path: the bound wants few enough roundings
constexpr int kMaxSegments = 64;
constexpr int kSplitRows = 2048;  // up to so many listed rows are shared out, each over several blocks
constexpr int kPartials = 8 * kSplitRows;

// ---- fp16 without a compiler type ---------------------------------------------------------------------------------

TMM_HD uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

TMM_HD float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TMM_HD uint64_t double_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

TMM_HD double bits_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The fp16 nearest to a float of any value rounded from `value`; too large becomes the largest finite one. Nothing
// below relies on the rounding being to nearest: residuals are measured.
TMM_HD uint16_t half_nearest(double value) {
  const uint32_t bits = float_bits(static_cast<float>(value));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7bffu);
  if (magnitude < 0x38800000u) {  // below 2^-14: the last bit of 0.5 + v is 2^-24, the spacing of the subnormals
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  magnitude += 0x0fffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

TMM_HD float half_value(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  const float value = magnitude < 0x400u ? static_cast<float>(magnitude) * 5.9604644775390625e-8f
                                         : bits_float((magnitude << 13) + 0x38000000u);
  return sign ? -value : value;
}

// The smallest fp16 not below `value`, for 0 <= value <= 65504.
TMM_HD uint16_t half_up(double value) {
  const uint16_t half = half_nearest(value);
  return static_cast<double>(half_value(half)) < value ? static_cast<uint16_t>(half + 1) : half;
}

// ---- elements of the inputs ---------------------------------------------------------------------------------------

// Type of elements that only the matrix tells. Where all matrices of a call are fp32, `float` takes its place: without
// the choice at every element, loads of several elements are under way at once.
struct AnyType {};

template <class T>
TMM_HD double element(const tmm_cuda_matrix& matrix, int64_t row, int64_t col) {
  const int64_t at = row * matrix.row_stride + col * matrix.col_stride;
  if constexpr (std::is_same<T, float>::value) {
    return static_cast<const float*>(matrix.device)[at];
  } else {
    switch (matrix.dtype) {
      case TMM_CUDA_F32: return static_cast<const float*>(matrix.device)[at];
      case TMM_CUDA_F64: return static_cast<const double*>(matrix.device)[at];
      case TMM_CUDA_F16: return half_value(static_cast<const uint16_t*>(matrix.device)[at]);
      default: return bits_float(static_cast<uint32_t>(static_cast<const uint16_t*>(matrix.device)[at]) << 16);
    }
  }
}

// One matrix, or two whose rows belong together; the columns count through.
struct Points {
  tmm_cuda_matrix part[2];
  double weight[2];  // of the squared distance
  double root[2];    // their square roots
  int parts;
  int dim;

  template <class T = AnyType>
  TMM_HD double value(int64_t row, int col) const {
    const int first = static_cast<int>(part[0].cols);
    return col < first ? element<T>(part[0], row, col) : element<T>(part[1], row, col - first);
  }
  // The coordinate used by the pass: shifted and weighted, each within a relative 2^-51 of its exact value.
  template <class T = AnyType>
  TMM_HD double shifted(int64_t row, int col, double mean) const {
    return root[col < part[0].cols ? 0 : 1] * (value<T>(row, col) - mean);
  }
  bool all_float() const {
    return part[0].dtype == TMM_CUDA_F32 && (parts == 1 || part[1].dtype == TMM_CUDA_F32);
  }
};

inline Points make_points(const tmm_cuda_matrix* matrices, const double* weights, int parts) {
  Points points;
  points.parts = parts;
  points.dim = 0;
  for (int p = 0; p < 2; ++p) {
    points.part[p] = matrices[p < parts ? p : 0];
    if (p >= parts) points.part[p].cols = 0;
    points.weight[p] = p < parts ? weights[p] : 0.0;
    points.root[p] = std::sqrt(points.weight[p]);
    points.dim += static_cast<int>(points.part[p].cols);
  }
  return points;
}

// Lane `lane` of kParts' shares of the distances between `rows` tokens and `count` codes. A distance is
// ((0+4)+(2+6)) + ((1+5)+(3+7)) of its shares, as the butterfly of cuda_rescore.cuh adds them; this order defines "the
// distance in double precision" of this library on CUDA.
template <class T, int rows, int count>
TMM_HD void distance_shares(const Points& tokens, const int64_t (&row)[rows], const Points& codes,
                            const int64_t (&code)[count], int lane, double (&share)[rows][count]) {
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < count; ++c) share[r][c] = 0.0;
  }
  for (int p = 0; p < tokens.parts; ++p) {
    double sum[rows][count] = {};
    TMM_UNROLL
    for (int64_t col = lane; col < tokens.part[p].cols; col += kParts) {
      double token[rows];
      for (int r = 0; r < rows; ++r) token[r] = element<T>(tokens.part[p], row[r], col);
      for (int c = 0; c < count; ++c) {
        const double value = element<T>(codes.part[p], code[c], col);
        for (int r = 0; r < rows; ++r) sum[r][c] = fma(token[r] - value, token[r] - value, sum[r][c]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < count; ++c) share[r][c] = fma(tokens.weight[p], sum[r][c], share[r][c]);
    }
  }
}

template <class T = AnyType>
TMM_HD bool same_values(const Points& codes, int64_t one, int64_t other) {
  bool same = true;
  for (int col = 0; same && col < codes.dim; ++col) same = codes.value<T>(one, col) == codes.value<T>(other, col);
  return same;
}

constexpr int64_t kNoCode = INT64_MAX;

// The minimum over (distance, index) of the codes scored so far, and the least distance among those that differ from
// that code in some value. Codes may come in any order and more than once; those without a finite distance (a NaN, an
// infinity, an overflow) count for nothing. Equal codes have equal distances, so values are compared only between codes
// of equal distance.
struct Best {
  double distance;
  int64_t code;
  double second;
};

TMM_HD Best no_best() { return {INFINITY, kNoCode, INFINITY}; }

template <bool margin>
TMM_HD void best_add(Best& best, const Points& codes, double distance, int64_t code) {
  if (code == best.code || !(distance < INFINITY)) return;
  const bool wins = distance < best.distance || (distance == best.distance && code < best.code);
  const double other = wins ? best.distance : distance;
  if (margin && other < best.second && !(distance == best.distance && same_values(codes, code, best.code))) {
    best.second = other;
  }
  if (wins) {
    best.distance = distance;
    best.code = code;
  }
}

template <bool margin>
TMM_HD void best_merge(Best& best, const Points& codes, const Best& other) {
  best_add<margin>(best, codes, other.distance, other.code);
  if (margin && other.second < best.second) best.second = other.second;
}

// Margin by which the second is farther, in roots of distances.
TMM_HD double best_margin(const Best& best) {
  if (!(best.second > best.distance)) return 0.0;
  return best.second < INFINITY ? (best.second - best.distance) / (sqrt(best.second) + sqrt(best.distance)) : INFINITY;
}

// The share of one value in the hash of a codebook: bijective in the value, and a sum over values needs no order.
TMM_HD uint64_t hash_value(double value, uint64_t place) {
  uint64_t x = double_bits(value) ^ (place * 0x9e3779b97f4a7c15ull);
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}

// ---- layout -------------------------------------------------------------------------------------------------------

// A thread of an m16n8 (or m64n256) fragment holds columns 8 j + 2 q + {0, 1} of a row, q its place in the quad.
// Codes are permuted within a span so that those are 16 consecutive codes: code 16 q + 2 j + p of a span lies in
// column 8 j + 2 q + p.
TMM_HD int span_column(int code) { return 8 * ((code % 16) / 2) + 2 * (code / 16) + code % 2; }

TMM_HD int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Division of one call. Rows go in chunks that bound the scratch memory; codes in segments that spread over the
// device. A (row, segment, lane) is a stream: it keeps its best group and the value of its second best.
struct Plan {
  int width;             // columns of the packed matrices
  int64_t padded_codes;
  int tiles;             // of kTile codes
  int segments, segment_tiles;
  int64_t chunk_rows;
  int64_t packed_bytes, mean_at, sums_at, norms_at, codes_at;
  int64_t workspace_bytes, rows_at, bounds_at, records_at, best_at, hash_at, partial_at, finished_at, list_at;
  int slabs;
  bool exact_only;

  TMM_HD int streams() const { return segments * kLanes; }
};

inline int64_t take(int64_t& cursor, int64_t bytes) {
  const int64_t at = cursor;
  cursor += round_up(bytes, 256);
  return at;
}

// ---- candidate records --------------------------------------------------------------------------------------------

// Values are bits of floats; only non-negative ones count, and those compare as integers.
struct Record {
  int32_t best, second, group, unused;
};

TMM_HD void record_clear(Record& record) {
  record.best = -1;
  record.second = -1;
  record.group = 0;
  record.unused = 0;
}

TMM_HD void record_add(Record& record, int32_t value, int32_t group) {
  const int32_t lower = value < record.best ? value : record.best;
  record.second = lower > record.second ? lower : record.second;
  record.group = value > record.best ? group : record.group;
  record.best = value > record.best ? value : record.best;
}

TMM_HD bool reaches(int32_t value, double threshold) {
  return value >= 0 && static_cast<double>(bits_float(static_cast<uint32_t>(value))) >= threshold;
}

// ---- the bound ----------------------------------------------------------------------------------------------------

enum RowStatus { kCertified = 0, kNotFinite = 1, kExact = 2 };

struct RowBound {
  double squared_norm;  // ||x||^2
  double slack;         // u - T + slack bounds the scaled score from above
  float offset;         // T
  int32_t exponent;     // i + k
  int32_t status;       // RowStatus
  int32_t unused;
};

struct CodeHeader {
  uint64_t largest_norm;   // bits of max ||c'||^2: order like integers
  uint64_t smallest_norm;  // the complement of the bits of min ||c'||^2, so that both grow from zero
  uint32_t overflow;       // a finite code has a norm beyond double precision: every row takes the exact path
  uint32_t unused;
  uint64_t hash;           // of every value
};

constexpr double kPad = 1.0 + 1.0 / (1 << 20);  // far above (D + 2) 2^-53, the relative error of a sum of squares
constexpr double kShiftError = 1.0 / (1ull << 50);  // relative error of Points::shifted, with room

// p with 4^p <= value < 4^(p+1): the exponent of a square root.
TMM_HD int root_exponent(double value) {
  const int exponent = ilogb(value);
  return exponent >= 0 ? exponent / 2 : -((1 - exponent) / 2);
}

// k: the largest code norm goes to [2^13, 2^14).
TMM_HD int code_exponent(double largest_norm) { return largest_norm > 0.0 ? 13 - root_exponent(largest_norm) : 0; }

// i: as the codes, or smaller so that the row's norm stays below 2^15.
TMM_HD int row_exponent(double squared_norm, int code) {
  if (!(squared_norm > 0.0)) return code;
  const int own = 14 - root_exponent(squared_norm);
  return own < code ? own : code;
}

// The matrix unit multiplies exactly and adds 16 products and the accumulator per instruction. Each addend is cut at
// 23 bits below the largest or finer, at most twice per instruction (two halves of 8), then the sum: at most 20
// errors of 2^-23 Q per 16 columns, Q the sum of the absolute products, which bounds every addend and partial sum.
TMM_HD double accumulation_error(int width) { return width / 16 * 20.0 / (1 << 23); }

// Relative error of a computed distance, of ||x||^2 and of their difference, each (D / 8 + 5) 2^-53 or less, with
// room.
TMM_HD double distance_error(int dim) { return (2.0 * dim + 64.0) / (1ull << 52); }

// The extra code values. squared_norm = ||C||^2 <= 2^28 and residual = ||dC||^2, both scaled. Bias: |h1| <= 2^15 errs
// by at most half its spacing, 2^3; times 2^11 that is |h2| <= 2^14 with error 2^2, and so |h3| <= 2^13 with error 2;
// in all 2^12 2^-22 2 = 2^-9 of -||C||^2 / 2, and the double precision of ||C||^2 is far below 2^-9 more.
TMM_HD void code_columns(double squared_norm, double residual, int width, uint16_t* out) {
  double rest = squared_norm * -0.5 / 4096.0 * (1.0 - 1.01 * accumulation_error(width));
  for (int j = 0; j < 3; ++j) {
    out[j] = half_nearest(rest);
    rest = (rest - half_value(out[j])) * 2048.0;
  }
  const double norm = sqrt(squared_norm) * kPad;
  out[3] = half_up(norm);
  out[4] = half_up(sqrt(residual) * kPad + norm * kShiftError);
  out[5] = half_nearest(32768.0);
}

// The extra row values and the row's bound. squared_norm = ||x||^2 unscaled; quantised = ||x^||^2 and residual =
// ||dX||^2 scaled.
TMM_HD RowBound row_columns(double squared_norm, double quantised, double residual, int row_exp, int code_exp,
                            const CodeHeader& codes, int dim, int width, uint16_t* out) {
  const double gamma = accumulation_error(width);
  RowBound bound;
  bound.squared_norm = squared_norm;
  bound.exponent = row_exp + code_exp;
  bound.status = kCertified;
  bound.unused = 0;
  const int drop = code_exp - row_exp;
  double lost = ldexp(1.0, -8 - drop);  // of the bias: the rest on the code side, and row values below the subnormals
  for (int j = 0; j < 3; ++j) {
    const double exact = ldexp(1.0, 12 - 11 * j - drop);
    out[j] = half_nearest(exact);
    lost += fabs(exact - half_value(out[j])) * ldexp(1.0, 15 - j);  // times the largest code value
  }
  const double kept = sqrt(quantised) * kPad, away = sqrt(residual) * kPad;
  const double alpha = (away + (kept + away) * kShiftError + gamma * kept) * (1.0 + 4.0 * gamma);
  const double a = kept * (1.0 + 4.0 * gamma);
  out[3] = half_up(alpha);
  out[4] = half_up(a);
  // T >= L + slack + rounding of S*, where slack <= (lost + gamma T) (1 + 2^-10) and gamma < 2^-8. For the best code
  // d* <= 2 ||x||^2 + 2 m^2.
  const double smallest = bits_double(~codes.smallest_norm);
  const double least = ldexp(sqrt(smallest) * kPad, code_exp);
  const double rounding = distance_error(dim) * ldexp(3.0 * squared_norm + 2.0 * smallest, bound.exponent);
  const double need = (kept + away) * least + ldexp(0.5 * least * least, -drop) + lost + rounding;
  const double tau = need * (1.0 + 1.0 / 64) / 32768.0;
  out[5] = half_up(tau);
  bound.offset = half_value(out[5]) * 32768.0f;
  bound.slack = (lost + gamma * bound.offset) * (1.0 + 1.0 / 1024);
  const bool fits = squared_norm < INFINITY && alpha <= 65504.0 && a <= 65504.0 && tau <= 65504.0 && !codes.overflow;
  if (!fits) bound.status = kExact;
  return bound;
}

// Codes with u below this are farther than a code at distance `best`, both as computed in double precision. The last
// term of pad stands for underflow. The nearest code has u >= 0; the nearest that differs from it may not, so below a
// threshold < 0 nothing is known of codes that the records leave out.
TMM_HD double threshold(const RowBound& bound, double best, int dim) {
  if (!(best < INFINITY)) return -INFINITY;
  const double pad = distance_error(dim) * (bound.squared_norm + best) + 1e-300;
  return ldexp(0.5 * (bound.squared_norm - best) - pad, bound.exponent) + bound.offset - bound.slack;
}

// ---- the plan -----------------------------------------------------------------------------------------------------

inline Plan make_plan(int64_t num_rows, int64_t num_codes, int64_t dim) {
  Plan plan;
  plan.exact_only = dim + kExtra > kMaxWidth;
  plan.width = static_cast<int>(plan.exact_only ? 16 : round_up(dim + kExtra, 16));
  plan.padded_codes = round_up(num_codes, kTile);
  plan.tiles = static_cast<int>(plan.padded_codes / kTile);
  // Segments of 4096 codes keep streams short, at most 16 of them; with few rows, more, so that about 264 blocks have
  // work.
  const int64_t row_tiles = round_up(num_rows > 0 ? num_rows : 1, kRowTile) / kRowTile;
  int64_t segments = (plan.tiles + 15) / 16;
  if (segments > 16) segments = 16;
  const int64_t spread = (264 + row_tiles - 1) / row_tiles;
  if (segments < spread) segments = spread;
  if (segments > kMaxSegments) segments = kMaxSegments;
  if (segments > plan.tiles) segments = plan.tiles;
  plan.segment_tiles = static_cast<int>((plan.tiles + segments - 1) / segments);
  plan.segments = (plan.tiles + plan.segment_tiles - 1) / plan.segment_tiles;

  plan.slabs = static_cast<int>(num_codes < 8192 ? (num_codes + 31) / 32 : 256);
  int64_t cursor = 0;
  take(cursor, sizeof(CodeHeader));
  plan.mean_at = take(cursor, dim * 8);
  plan.sums_at = take(cursor, plan.slabs * dim * 8);
  plan.norms_at = take(cursor, num_codes * 8);
  plan.codes_at = take(cursor, plan.exact_only ? 0 : plan.padded_codes * plan.width * 2);
  plan.packed_bytes = cursor;

  // About 24 MB of scratch per chunk, whole row tiles.
  const int64_t row_bytes = plan.width * 2 + sizeof(RowBound) + plan.streams() * sizeof(Record) + sizeof(Best) + 4;
  int64_t rows = (int64_t{24} << 20) / row_bytes / kRowTile * kRowTile;
  if (rows < kRowTile) rows = kRowTile;
  plan.chunk_rows = rows < row_tiles * kRowTile ? rows : row_tiles * kRowTile;
  cursor = 0;
  plan.rows_at = take(cursor, plan.chunk_rows * plan.width * 2);
  plan.bounds_at = take(cursor, plan.chunk_rows * sizeof(RowBound));
  plan.records_at = take(cursor, plan.chunk_rows * plan.streams() * sizeof(Record));
  plan.best_at = take(cursor, plan.chunk_rows * sizeof(Best));
  plan.hash_at = take(cursor, 8);
  plan.partial_at = take(cursor, kPartials * sizeof(Best));
  plan.finished_at = take(cursor, kSplitRows * 4);        // the list follows: both are cleared at once
  plan.list_at = take(cursor, (plan.chunk_rows + 1) * 4);  // a count, then rows
  plan.workspace_bytes = cursor;
  return plan;
}

}  // namespace tmm
