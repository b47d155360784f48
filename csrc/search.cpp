// Exact nearest code by certificate.
//
// With x = z - mean and c = c_k - mean, the nearest code maximises s_k = x.c - |c|^2/2. A rung computes s~_k from quantised
// x^ = s_x q_x and c^ = s_c q_c, exactly in int32 or with a known rounding error in float32. By Cauchy-Schwarz
//
//   |s_k - s~_k| = |(x - x^).c + x^.(c - c^) + rounding| <= |x - x^| max|c| + |x^| max|c - c^| + rounding =: E,
//
// where the residual norms are measured, not estimated. Let s* be the true score of any code. The winner k has s_k >= s*, hence
// s~_k >= s* - E; so it is enough to score, in double precision and in the difference form, the groups whose maximum of s~ is
// at least s* - E. First the best group is scored, which gives s*, then the others. The answer is the lexicographic minimum of
// (distance, index): it depends on the row alone, not on the rung, the tile, the block or the thread.
//
// The ladder: int8, int16, float32, and last the difference rung, whose bound is relative to the score itself. A probe of some
// rows decides whether a rung leaves more to score in double precision than the next rung costs.
//
// Ranges of the integer rungs: |q_x . q_c| <= 2^29 (int8: 255 * 127 * d <= 2^28, and as much again for the dimensions kept in 16
// bits, see kMaxWide; int16: Cauchy-Schwarz on kInt16Norm) and
// s_x is kept large enough for |bias| <= 2^29, so every partial sum fits int32.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "search.h"

namespace tmm {
namespace {

constexpr int64_t kProbeRows = 48;
constexpr int64_t kGroupBudget = 1 << 20;  // group maxima of a block, in int32: more, and groups of more codes are scored
constexpr int64_t kAllGroups = 6 << 20;    // and of all threads together
constexpr int64_t kMaxInt8Dim = 8192;
constexpr double kFarthest = 1e15;        // rows farther out than this many codebook radii are searched in full

// What is known of a row after packing it: score = unit * (integer - offset), or the float32 itself.
struct RowState {
  double norm2, bound, unit;
  int64_t offset;
  bool usable;
};

// One thread's search of blocks of rows on one rung.
class BlockSearch {
 public:
  BlockSearch(const Query& query, const Pack& pack, int rung, int64_t block_rows)
      : query_(query), book_(*query.book), pack_(pack), isa_(*book_.isa), rung_(rung), rows_(block_rows),
        panel_(int64_t{isa_.lanes} * isa_.vectors) {
    const int64_t budget = std::min<int64_t>(kGroupBudget, kAllGroups / query.threads);
    span_ = std::max<int64_t>(1, (book_.panels * isa_.lanes * rows_ + budget - 1) / budget);
    groups_per_row_ = (book_.panels + span_ - 1) / span_ * isa_.lanes;
    inverse_norm_ = 1 / (kInt16Norm - std::sqrt(static_cast<double>(book_.d)));
    smallest_scale_ = std::max(book_.max_bias / (pack.scale * 536870000.0), 1e-30);
    x_.reset(book_.padded);
    ordered_.reset(pack.words(book_.padded));
    words_.reset(pack.words(book_.padded));
    tokens_.reset(rows_ * pack.steps);
    groups_.reset(rows_ * groups_per_row_);
    bias_table_.reset(rows_ * panel_);
    list_.reset(kCapacity);
  }

  // Rows row_of(0 .. count-1); `keep` false only measures.
  template <class RowOf>
  Stats run(int64_t count, RowOf row_of, bool keep) {
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    num_scales_ = 0;
    std::memset(scale_slot_, 0xff, sizeof scale_slot_);
    std::memset(scale_of_, 0, sizeof scale_of_);
    if (count % kTileRows) std::memset(tokens_.get(), 0, sizeof(int32_t) * tiles * kTileRows * pack_.steps);
    for (int64_t r = 0; r < count; ++r) pack_row(row_of(r), r);
    if (num_scales_ == 0) scales_[num_scales_++] = 1.0f;
    isa_.scan[rung_]({pack_.codes.get(), book_.panels, pack_.steps, pack_.wide / 2, pack_.bias.get(), tokens_.get(), tiles, scales_,
                      num_scales_, scale_of_, bias_table_.get(), groups_.get(), groups_per_row_, span_});
    Stats stats;
    for (int64_t r = 0; r < count; ++r) select(row_of(r), r, keep, &stats);
    stats.rows = count;
    return stats;
  }

 private:
  void pack_row(int64_t row, int64_t r) {
    const RowStats stats = book_.centre(query_.z, row, rung_, x_.get());
    RowState& state = state_[r];
    state.norm2 = stats.norm2 * book_.scale * book_.scale;
    state.usable = std::isfinite(stats.norm2) && stats.largest < (rung_ == kDifference ? 1e18 : kFarthest);
    int32_t* out = tokens_.get() + r / kTileRows * kTileRows * pack_.steps + r % kTileRows;
    if (!state.usable) {
      for (int64_t step = 0; step < pack_.steps; ++step) out[step * kTileRows] = 0;
      return;
    }
    const double norm = std::sqrt(state.norm2), rounding = book_.max_bias + norm * book_.radius;
    const void* source = x_.get();
    state.unit = 1;
    state.offset = 0;
    if (rung_ == kDifference) {
      state.bound = 0;  // relative to the score: see bound()
    } else if (rung_ == kFloat32) {
      // d + 1 fused steps, and the rounding of x, c and the bias, each at most a unit of 2^-24 of the sum of magnitudes.
      state.bound = (static_cast<double>(book_.d) + 10) * 0x1p-24 * 1.01 * rounding;
    } else {
      if (pack_.wide) pack_.reorder(x_.get(), ordered_.get());
      const double least = rung_ == kInt16 ? norm * inverse_norm_
                           : pack_.wide    ? pack_.mixed_scale(isa_, ordered_.get(), false)
                                           : isa_.token_scale(x_.get(), book_.padded);
      const float scale = row_scale(least, r);
      const QuantStats quantised = pack_.wide ? pack_.quantise_mixed(isa_, ordered_.get(), scale, words_.get())
                                              : isa_.quantise[rung_](x_.get(), book_.padded, scale, words_.get());
      source = words_.get();
      state.unit = static_cast<double>(scale) * pack_.scale;
      state.offset = rung_ == kInt8 ? static_cast<int64_t>(isa_.code_levels + 1) * quantised.sum : 0;  // as the codes are stored
      const double residual = std::sqrt(static_cast<double>(quantised.residual2)) * 1.001;
      state.bound = 1.0001 * (residual * book_.radius + (norm + residual) * pack_.residual) + 0.51 * state.unit + 0x1p-22 * rounding;
    }
    // What double precision itself loses in s* = (|x|^2 - d^2) / 2.
    state.bound += 0x1p-51 * (static_cast<double>(book_.d) + 8) * (state.norm2 + book_.max_bias);
    for (int64_t step = 0; step < pack_.steps; ++step)
      std::memcpy(out + step * kTileRows, static_cast<const char*>(source) + 4 * step, 4);
  }

  // s_x, rounded up to one of eight values per octave so that few bias tables are needed, and its table in this block.
  float row_scale(double least, int64_t r) {
    const float scale = static_cast<float>(std::max(least, smallest_scale_));
    uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    bits = (bits >> 20) + 1;
    const uint32_t rounded_bits = bits << 20;
    float rounded;
    std::memcpy(&rounded, &rounded_bits, 4);
    if (scale_slot_[bits] == 0xff) {
      scales_[num_scales_] = static_cast<float>(1.0 / (static_cast<double>(rounded) * pack_.scale));
      scale_slot_[bits] = static_cast<uint8_t>(num_scales_++);
    }
    scale_of_[r] = scale_slot_[bits];
    return rounded;
  }

  // The true score at a squared distance, and E at a score. The difference rung scores -|z - c|^2, whose float32 terms err
  // relative to themselves, by d + 3 roundings of 2^-24 (and by the smallest float32 where they underflow), wherever the
  // codes lie: it is what remains when a few far codes spoil every bound that is relative to the codebook's radius.
  double true_score(double distance, const RowState& state) const {
    return rung_ == kDifference ? -distance : 0.5 * (state.norm2 - distance * book_.scale * book_.scale);
  }
  double bound(double score, const RowState& state) const {
    if (rung_ != kDifference) return state.bound;
    const double d = static_cast<double>(book_.d);
    return (d + 8) * 0x1p-24 * 1.01 * std::fabs(score) + d * 1e-44;
  }

  double score_of(int32_t group, const RowState& state) const {
    if (rung_ < kFloat32) return state.unit * static_cast<double>(group - state.offset);
    const int32_t bits = group ^ ((group >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // The largest group value that is surely below `score`.
  int32_t threshold_for(double score, const RowState& state) const {
    if (rung_ < kFloat32) {
      const double value = std::floor(score / state.unit) + static_cast<double>(state.offset) - 1;
      return static_cast<int32_t>(std::max(value, static_cast<double>(kLowestValid)));
    }
    const float value = std::nextafter(static_cast<float>(score), -std::numeric_limits<float>::infinity());
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  }

  void score_group(int64_t row, int32_t group, Best* best) const {
    const int64_t block = group / isa_.lanes, lane = group % isa_.lanes;
    for (int64_t panel = block * span_; panel < std::min(book_.panels, (block + 1) * span_); ++panel) {
      const int64_t first = panel * panel_ + lane * isa_.vectors;
      query_.codes.score(isa_, query_.z, row, first, std::min(book_.k, first + isa_.vectors), best);
    }
  }

  void select(int64_t row, int64_t r, bool keep, Stats* stats) {
    const RowState& state = state_[r];
    const int32_t* groups = groups_.get() + r * groups_per_row_;
    int64_t found = kCapacity + 1;
    int32_t top = 0;
    if (state.usable) {
      top = isa_.largest(groups, groups_per_row_);
      if (rung_ == kDifference && !(score_of(top, state) > -1e37)) {  // overflow
        if (keep) search_in_full(query_, row);
        return;
      }
      const double score = score_of(top, state);
      const int32_t threshold = threshold_for(score - 2 * bound(score, state), state);
      found = isa_.collect(groups, groups_per_row_, threshold, list_.get(), kCapacity);
    }
    const int64_t group_codes = isa_.vectors * span_;
    stats->codes += found > kCapacity ? book_.k : found * group_codes;
    if (found > kCapacity) {
      if (keep) search_in_full(query_, row);
      return;
    }
    Best best = kNothing;
    int64_t first = 0;
    while (groups[list_[first]] != top) ++first;
    score_group(row, list_[first], &best);
    const double score = true_score(best.distance, state);
    // The same inequality, the other way round: it can only fail when the codebook is not the one that was packed.
    if (!(std::fabs(score - score_of(top, state)) <= bound(score, state))) stats->stale = true;
    if (found > 1) {
      const int32_t threshold = threshold_for(score - bound(score, state), state);
      for (int64_t i = 0; i < found; ++i)
        if (i != first && groups[list_[i]] >= threshold) score_group(row, list_[i], &best);
    }
    if (keep) store(query_, row, best);
  }

  static constexpr int kScales = 2049;  // exponent and three bits of mantissa of a positive float32
  const Query& query_;
  const Codebook& book_;
  const Pack& pack_;
  const Isa& isa_;
  const int rung_;
  const int64_t rows_, panel_;
  int64_t span_, groups_per_row_;
  double inverse_norm_, smallest_scale_;
  Buffer<float> x_, ordered_;
  Buffer<int32_t> words_, tokens_, groups_, bias_table_, list_;
  RowState state_[kBlockRows];
  float scales_[kBlockRows];
  uint8_t scale_slot_[kScales], scale_of_[kBlockRows];
  int num_scales_ = 0;
};

int64_t block_rows(int64_t n, int threads) {
  const int64_t share = (n + threads - 1) / threads;
  return std::min<int64_t>(kBlockRows, (share + kTileRows - 1) / kTileRows * kTileRows);
}

Stats search_rung(const Query& query, const Pack& pack, int rung) {
  const int64_t block = block_rows(query.n, query.threads);
  return over_blocks(
      query, block, [&] { return std::make_unique<BlockSearch>(query, pack, rung, block); },
      [](BlockSearch& search, int64_t first, int64_t last) {
        return search.run(last - first, [first](int64_t r) { return first + r; }, true);
      });
}

Stats search_all_in_full(const Query& query) {
  return over_blocks(
      query, 1, [] { return std::make_unique<int>(); },
      [&](int, int64_t first, int64_t) {
        search_in_full(query, first);
        return Stats{};
      });
}

// Cycles per multiply-add of a rung's main loop, roughly, and of scoring a candidate in double precision.
double cycles_per_product(const Isa& isa, int rung) {
  const double lanes = isa.lanes;
  return rung == kInt8 ? 0.25 / lanes : rung == kInt16 ? 0.5 / lanes : rung == kFloat32 ? 1 / lanes : 2 / lanes;
}

// Whether the next rung's slower pass costs less than what this rung leaves to score in double precision.
int better_rung(const Codebook& book, int rung, const Stats& stats) {
  const double products = static_cast<double>(book.k) * static_cast<double>(book.d);
  const double scored = stats.rows ? static_cast<double>(stats.codes) / static_cast<double>(stats.rows) : 0;
  const double excess = (scored - 2.0 * book.isa->vectors) * (0.5 * static_cast<double>(book.d) + 16);
  int next = rung + 1;
  while (next < kRungs && !book.isa->has[next]) ++next;
  if (next == kRungs || (next == kDifference && book.dtype != TMM_F32)) return rung;  // it needs the values themselves
  return excess > products * (cycles_per_product(*book.isa, next) - cycles_per_product(*book.isa, rung)) ? next : rung;
}

int lowest_rung(const Codebook& book) {
  if (book.rung >= 0) return book.rung;
  if (book.isa->has[kInt8] && book.d <= kMaxInt8Dim) return kInt8;
  return book.isa->has[kInt16] && book.d < 1000000 ? kInt16 : kFloat32;
}

const Pack& locked_pack(Codebook& book, const Rows& codes, int rung, int threads) {
  std::lock_guard<std::mutex> lock(book.mutex);
  return book.pack(codes, rung, threads);
}

Stats probe(const Query& query, const Pack& pack, int rung) {
  const int64_t count = std::min<int64_t>(kProbeRows, query.n / 4), stride = query.n / count;
  BlockSearch search(query, pack, rung, (count + kTileRows - 1) / kTileRows * kTileRows);
  return search.run(count, [stride](int64_t r) { return r * stride; }, false);
}

Stats search_ladder(const Query& query) {
  Codebook& book = *query.book;
  int rung = lowest_rung(book);
  for (;;) {
    const Pack& pack = locked_pack(book, query.codes, rung, query.threads);
    if (query.n >= 32) {
      const int better = better_rung(book, rung, probe(query, pack, rung));
      if (better != rung) {
        rung = better;
        continue;
      }
    }
    const Stats stats = search_rung(query, pack, rung);
    std::lock_guard<std::mutex> lock(book.mutex);
    book.rung = std::max(rung, query.n >= 32 ? rung : better_rung(book, rung, stats));
    book.last_method = TMM_INT8 + rung;
    return stats;
  }
}

// The box tree wins for few dimensions; from about ten on it visits too many leaves.
bool wants_tree(const Query& query) {
  const Codebook& book = *query.book;
  return query.z.dtype == TMM_F32 && book.d <= 8 && book.usable >= 512;
}

Stats search(const Query& query) {
  Codebook& book = *query.book;
  {
    std::lock_guard<std::mutex> lock(book.mutex);
    const bool once = !book.prepared && book.method == TMM_AUTO && book.rows_before + query.n <= 3;
    book.rows_before = std::min<int64_t>(book.rows_before + query.n, 1 << 20);
    if (once || book.method == TMM_BRUTE) {
      book.last_method = TMM_BRUTE;
    } else {
      book.prepare(query.codes, query.threads);
      if (!book.representable || book.usable <= 1) book.last_method = TMM_BRUTE;
      else if (book.method == TMM_TREE || (book.method == TMM_AUTO && wants_tree(query))) book.last_method = TMM_TREE;
      else book.last_method = book.method;
    }
    if (book.last_method == TMM_TREE) book.box_tree(query.codes);
  }
  switch (book.last_method) {
    case TMM_BRUTE: return search_all_in_full(query);
    case TMM_TREE: return search_tree(query, *book.tree);
    case TMM_AUTO: return search_ladder(query);
    default: {
      const int rung = book.last_method - TMM_INT8;
      return search_rung(query, locked_pack(book, query.codes, rung, query.threads), rung);
    }
  }
}

}  // namespace
}  // namespace tmm

int tmm_nearest_code(tmm_codebook* handle, const void* codes, const void* z, int64_t n, int64_t* ids, void* distance, int threads) {
  auto* book = reinterpret_cast<tmm::Codebook*>(handle);
  if (!book || n < 0 || threads < 1) return TMM_BAD_ARGUMENT;
  if (n == 0) return TMM_OK;
  try {
    const double work = static_cast<double>(n) * static_cast<double>(book->k) * static_cast<double>(book->d);
    threads = std::min(threads, 1 + static_cast<int>(std::min(work / (1 << 19), 1e6)));
    const tmm::Query query{book, {codes, book->dtype, book->d}, {z, book->dtype, book->d}, n, ids, distance, threads};
    return tmm::search(query).stale ? TMM_STALE : TMM_OK;
  } catch (const std::bad_alloc&) {
    return TMM_NO_MEMORY;
  }
}
