// The CUDA search on the host, loop by loop, with the arithmetic of csrc/cuda_shared.h: a proof that the certificate
// is right, driven by test_cuda_host.py. The matrix unit is replaced by a model that errs as much as the bound allows
// it to.
#include <algorithm>
#include <iterator>
#include <vector>

#include "cuda_shared.h"

namespace {

using namespace tmm;

struct Statistics {
  int64_t certified, listed, groups, excess;  // excess: codes whose value exceeds its bound, which must stay 0
};

double truncate(double value, int last_bit) { return std::ldexp(std::trunc(std::ldexp(value, -last_bit)), last_bit); }

// One instruction of 16 products: two halves of 8 products and the accumulator, every addend and the sum cut towards
// zero at 23 bits below the largest addend (hardware keeps more).
float multiply_add(const uint16_t* row, const uint16_t* code, float acc) {
  for (int half = 0; half < 2; ++half) {
    double addends[9];
    double largest = std::fabs(acc);
    addends[8] = acc;
    for (int i = 0; i < 8; ++i) {
      addends[i] = static_cast<double>(half_value(row[half * 8 + i])) * half_value(code[half * 8 + i]);
      largest = std::max(largest, std::fabs(addends[i]));
    }
    if (largest == 0.0) continue;
    const int last_bit = std::ilogb(largest) - 23;
    double sum = 0.0;
    for (double addend : addends) sum += truncate(addend, last_bit);
    acc = sum == 0.0 ? 0.0f : static_cast<float>(truncate(sum, std::ilogb(sum) - 23));
  }
  return acc;
}

double distance(const Points& tokens, int64_t row, const Points& codes, int64_t code) {
  double share[kParts];
  const int64_t rows[1] = {row}, scored[1] = {code};
  for (int lane = 0; lane < kParts; ++lane) {
    double one[1][1];
    distance_shares<AnyType>(tokens, rows, codes, scored, lane, one);
    share[lane] = one[0][0];
  }
  for (int step = kParts / 2; step > 0; step >>= 1) {
    for (int lane = 0; lane < step; ++lane) share[lane] += share[lane + step];
  }
  return share[0];
}

struct Codebook {
  Points points;
  int64_t count = 0;
  Plan plan;
  CodeHeader header = {};
  std::vector<double> mean;
  std::vector<uint8_t> valid;
  std::vector<uint16_t> packed;
};

double squared_norm(const Points& points, int64_t row, const std::vector<double>& mean, bool* finite) {
  double sum = 0.0;
  *finite = true;
  for (int col = 0; col < points.dim; ++col) {
    *finite = *finite && std::isfinite(points.value(row, col));
    const double shifted = points.shifted(row, col, mean[col]);
    sum = std::fma(shifted, shifted, sum);
  }
  return sum;
}

void quantise(const Points& points, int64_t row, const std::vector<double>& mean, int exponent, uint16_t* out,
              double* quantised, double* residual) {
  *quantised = *residual = 0.0;
  for (int col = 0; col < points.dim; ++col) {
    const double exact = std::ldexp(points.shifted(row, col, mean[col]), exponent);
    out[col] = half_nearest(exact);
    const double value = half_value(out[col]);
    *quantised += value * value;
    *residual += (exact - value) * (exact - value);
  }
}

void pack(Codebook& codebook) {
  const Points& points = codebook.points;
  const Plan& plan = codebook.plan;
  codebook.mean.assign(points.dim, 0.0);
  for (int col = 0; col < points.dim; ++col) {
    double sum = 0.0;
    for (int64_t code = 0; code < codebook.count; ++code) {
      const double value = points.value(code, col);
      if (std::isfinite(value)) sum += value;
    }
    const double mean = sum / static_cast<double>(codebook.count);
    codebook.mean[col] = std::isfinite(mean) ? mean : 0.0;
  }
  codebook.valid.assign(codebook.count, 0);
  double largest = 0.0, smallest = INFINITY;
  for (int64_t code = 0; code < codebook.count; ++code) {
    bool finite;
    const double norm = squared_norm(points, code, codebook.mean, &finite);
    codebook.valid[code] = finite;
    if (finite && norm < INFINITY) {
      largest = std::max(largest, norm);
      smallest = std::min(smallest, norm);
    }
    if (finite && !(norm < INFINITY)) codebook.header.overflow = 1;
  }
  codebook.header.largest_norm = double_bits(largest);
  codebook.header.smallest_norm = ~double_bits(smallest);
  codebook.packed.assign(plan.padded_codes * plan.width, 0);
  const int exponent = code_exponent(largest);
  for (int64_t code = 0; code < codebook.count; ++code) {
    if (!codebook.valid[code]) continue;
    uint16_t* out = &codebook.packed[(code / kSpan * kSpan + span_column(static_cast<int>(code % kSpan))) * plan.width];
    bool finite;
    const double norm = std::ldexp(squared_norm(points, code, codebook.mean, &finite), 2 * exponent);
    double quantised, residual;
    quantise(points, code, codebook.mean, exponent, out, &quantised, &residual);
    code_columns(norm, residual, plan.width, out + points.dim);
  }
}

// The records of one row, as the pass leaves them; `values` gets u of every packed column.
void pass(const Codebook& codebook, const uint16_t* row, std::vector<Record>& records, std::vector<float>& values) {
  const Plan& plan = codebook.plan;
  for (int64_t column = 0; column < plan.padded_codes; ++column) {
    float acc = 0.0f;
    for (int k = 0; k < plan.width; k += 16) {
      acc = multiply_add(row + k, &codebook.packed[column * plan.width + k], acc);
    }
    values[column] = acc;
  }
  for (Record& record : records) record_clear(record);
  for (int segment = 0; segment < plan.segments; ++segment) {
    const int last = std::min((segment + 1) * plan.segment_tiles, plan.tiles) * (kTile / kSpan);
    for (int span = segment * plan.segment_tiles * (kTile / kSpan); span < last; ++span) {
      for (int lane = 0; lane < kLanes; ++lane) {
        int32_t largest = INT32_MIN;
        for (int j = 0; j < 8; ++j) {
          for (int p = 0; p < 2; ++p) {
            const uint32_t bits = float_bits(values[static_cast<int64_t>(span) * kSpan + 8 * j + 2 * lane + p]);
            largest = std::max(largest, static_cast<int32_t>(bits));
          }
        }
        record_add(records[segment * kLanes + lane], largest, span * kLanes + lane);
      }
    }
  }
}

void score(const Points& tokens, int64_t row, const Codebook& codebook, int64_t code, Best& best) {
  if (code >= codebook.count) return;
  best_add<true>(best, codebook.points, distance(tokens, row, codebook.points, code), code);
}

void score_group(const Points& tokens, int64_t row, const Codebook& codebook, int group, Best& best) {
  for (int i = 0; i < kGroup; ++i) score(tokens, row, codebook, static_cast<int64_t>(group) * kGroup + i, best);
}

void score_stream(const Points& tokens, int64_t row, const Codebook& codebook, int stream, Best& best) {
  const Plan& plan = codebook.plan;
  const int first = stream / kLanes * plan.segment_tiles;
  const int last = std::min(first + plan.segment_tiles, plan.tiles);
  for (int at = 0; at < (last - first) * (kTile / kLanes); ++at) {
    const int64_t code = at / kGroup * kSpan + stream % kLanes * kGroup + at % kGroup;
    score(tokens, row, codebook, static_cast<int64_t>(first) * kTile + code, best);
  }
}

// Counts codes whose value breaks the promise 2^(i+k) s_k <= u_k - T + slack, and rows whose best value is negative.
int64_t count_excess(const Points& tokens, int64_t row, const Codebook& codebook, const RowBound& bound,
                     const std::vector<float>& values) {
  int64_t excess = 0;
  bool positive = false;
  for (int64_t code = 0; code < codebook.count; ++code) {
    if (!codebook.valid[code]) continue;
    long double exact = 0.0L;
    for (int col = 0; col < tokens.dim; ++col) {
      const long double root = tokens.root[col < tokens.part[0].cols ? 0 : 1];
      const long double x = root * (static_cast<long double>(tokens.value(row, col)) - codebook.mean[col]);
      const long double c = root * (static_cast<long double>(codebook.points.value(code, col)) - codebook.mean[col]);
      exact += x * c - 0.5L * c * c;
    }
    const float value = values[code / kSpan * kSpan + span_column(static_cast<int>(code % kSpan))];
    const long double upper = static_cast<long double>(value) - bound.offset + bound.slack;
    if (std::ldexp(exact, bound.exponent) > upper) ++excess;
    positive = positive || !std::signbit(value);
  }
  return excess + !positive;
}

Best search(const Points& tokens, int64_t row, const Codebook& codebook, bool check, bool margin,
            Statistics& statistics) {
  const Plan& plan = codebook.plan;
  const int dim = tokens.dim;
  bool finite;
  const double norm = squared_norm(tokens, row, codebook.mean, &finite);
  Best best = no_best();
  if (!finite) return {NAN, -1, NAN};
  std::vector<uint16_t> packed(plan.width, 0);
  const int code_exp = code_exponent(bits_double(codebook.header.largest_norm));
  const int row_exp = row_exponent(norm, code_exp);
  double quantised, residual;
  quantise(tokens, row, codebook.mean, row_exp, packed.data(), &quantised, &residual);
  const RowBound bound =
      row_columns(norm, quantised, residual, row_exp, code_exp, codebook.header, dim, plan.width, packed.data() + dim);
  if (bound.status == kExact) {
    ++statistics.listed;
    for (int64_t code = 0; code < codebook.count; ++code) score(tokens, row, codebook, code, best);
    return best;
  }
  std::vector<Record> records(plan.streams());
  std::vector<float> values(plan.padded_codes);
  pass(codebook, packed.data(), records, values);
  if (check) statistics.excess += count_excess(tokens, row, codebook, bound, values);
  int top = 0;
  for (int stream = 1; stream < plan.streams(); ++stream) {
    if (records[stream].best > records[top].best) top = stream;
  }
  score_group(tokens, row, codebook, records[top].group, best);
  ++statistics.groups;
  for (int stream = 0; stream < plan.streams(); ++stream) {
    if (stream == top || !reaches(records[stream].best, threshold(bound, margin ? best.second : best.distance, dim))) continue;
    score_group(tokens, row, codebook, records[stream].group, best);
    ++statistics.groups;
  }
  const double limit = threshold(bound, margin ? best.second : best.distance, dim);
  bool complete = true;
  for (int stream = 0; stream < plan.streams(); ++stream) {
    if (!reaches(records[stream].second, limit) && !(margin && !(limit >= 0.0))) continue;
    complete = false;
    score_stream(tokens, row, codebook, stream, best);
  }
  ++(complete ? statistics.certified : statistics.listed);
  return best;
}

}  // namespace

extern "C" {

// tmm_cuda_nearest with host pointers; `margins` may be null; `statistics` gets certified rows, listed rows, groups scored, broken bounds.
int emulate_nearest(const tmm_cuda_matrix* tokens, const tmm_cuda_matrix* codes, const double* weights, int parts,
                    int64_t* ids, double* distances, double* margins, int check, int64_t* statistics) {
  Codebook codebook;
  codebook.points = make_points(codes, weights, parts);
  codebook.count = codes[0].rows;
  const Points rows = make_points(tokens, weights, parts);
  codebook.plan = make_plan(tokens[0].rows, codes[0].rows, rows.dim);
  if (codebook.plan.exact_only) return 1;
  pack(codebook);
  Statistics total = {};
  for (int64_t row = 0; row < tokens[0].rows; ++row) {
    const Best best = search(rows, row, codebook, check != 0, margins != nullptr, total);
    ids[row] = best.code == kNoCode ? 0 : best.code;
    distances[row] = best.distance;
    if (margins) margins[row] = best.code < 0 ? NAN : best_margin(best);
  }
  statistics[0] = total.certified;
  statistics[1] = total.listed;
  statistics[2] = total.groups;
  statistics[3] = total.excess;
  return 0;
}

int32_t emulate_half(double value, int up) { return up ? half_up(value) : half_nearest(value); }

double emulate_half_value(int32_t half) { return half_value(static_cast<uint16_t>(half)); }

int32_t emulate_span_column(int32_t code) { return span_column(code); }

int32_t emulate_root_exponent(double value) { return root_exponent(value); }

// width, padded codes, tiles, segments, segment tiles, chunk rows, packed bytes, workspace bytes
void emulate_plan(int64_t rows, int64_t codes, int64_t dim, int64_t* out) {
  const Plan plan = make_plan(rows, codes, dim);
  const int64_t values[] = {plan.width,         plan.padded_codes, plan.tiles,        plan.segments,
                            plan.segment_tiles, plan.chunk_rows,   plan.packed_bytes, plan.workspace_bytes};
  std::copy(std::begin(values), std::end(values), out);
}

}  // extern "C"
