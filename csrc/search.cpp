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

constexpr int64_t kProbeRows = 48;   // a multiple of kTileRows
constexpr int64_t kLeastProbed = 32;  // rows of a call from which some of them choose the rung first
constexpr int64_t kGroupBudget = 1 << 20;  // group maxima of a block, in int32: more, and groups of more codes are scored
constexpr int64_t kAllGroups = 6 << 20;    // and of all threads together
constexpr int64_t kMaxInt8Dim = 8192;
constexpr double kFarthest = 1e15;        // rows farther out than this many codebook radii are searched in full

// State of a row after packing it: score = unit * (integer - offset), or the float32 itself.
struct RowState {
  double norm2, bound, unit;
  int64_t offset;
  bool usable;
};

// One thread's search of blocks of rows on one rung.
class BlockSearch {
 public:
  BlockSearch(const Query& query, const Codebook& book, const Summary& known, const Pack& pack, int rung, int64_t block_rows)
      : query_(query), book_(book), known_(known), pack_(pack), isa_(*book.isa), rung_(rung), rows_(block_rows),
        panel_(int64_t{isa_.lanes} * isa_.vectors) {
    const int64_t budget = std::min<int64_t>(kGroupBudget, kAllGroups / query.threads);
    span_ = std::max<int64_t>(1, (book_.panels * isa_.lanes * rows_ + budget - 1) / budget);
    groups_per_row_ = (book_.panels + span_ - 1) / span_ * isa_.lanes;
    inverse_norm_ = 1 / (kInt16Norm - std::sqrt(static_cast<double>(book_.d)));
    smallest_scale_ = std::max(known_.max_bias / (pack.scale * 536870000.0), 1e-30);
    x_.reset(book_.padded);
    ordered_.reset(pack.words(book_.padded));
    words_.reset(pack.words(book_.padded));
    tokens_.reset(rows_ * pack.steps);
    groups_.reset(rows_ * groups_per_row_);
    bias_table_.reset(rows_ * panel_);
    list_.reset(kCapacity);
  }

  // Rows row_of(0 .. count-1).
  template <class RowOf>
  Stats run(int64_t count, RowOf row_of) {
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
    for (int64_t r = 0; r < count; ++r) select(row_of(r), r, &stats);
    stats.rows = count;
    return stats;
  }

 private:
  void pack_row(int64_t row, int64_t r) {
    const RowStats stats = book_.centre(known_, query_.z, row, rung_, x_.get());
    RowState& state = state_[r];
    state.norm2 = stats.norm2 * known_.scale * known_.scale;
    state.usable = std::isfinite(stats.norm2) && stats.largest < (rung_ == kDifference ? 1e18 : kFarthest);
    int32_t* out = tokens_.get() + r / kTileRows * kTileRows * pack_.steps + r % kTileRows;
    if (!state.usable) {
      for (int64_t step = 0; step < pack_.steps; ++step) out[step * kTileRows] = 0;
      return;
    }
    const double norm = std::sqrt(state.norm2), rounding = known_.max_bias + norm * known_.radius;
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
      double least = norm * inverse_norm_;
      if (rung_ == kInt8) {
        least = pack_.wide ? pack_.mixed_scale(isa_, ordered_.get()) : stats.largest / kTokenLevels;
        if (!pack_.wide && isa_.run_scale) least = std::max<double>(least, isa_.run_scale(x_.get(), book_.padded));
      }
      const float scale = row_scale(least, r);
      const QuantStats quantised = pack_.wide ? pack_.quantise_mixed(isa_, ordered_.get(), scale, words_.get())
                                              : isa_.quantise[rung_](x_.get(), book_.padded, scale, words_.get());
      source = words_.get();
      state.unit = static_cast<double>(scale) * pack_.scale;
      state.offset = rung_ == kInt8 ? int64_t{isa_.code_offset} * quantised.sum : 0;  // as the codes are stored
      const double residual = std::sqrt(static_cast<double>(quantised.residual2)) * 1.001;
      state.bound = 1.0001 * (residual * known_.radius + (norm + residual) * pack_.residual) + 0.51 * state.unit + 0x1p-22 * rounding;
    }
    // Error of double precision itself in s* = (|x|^2 - d^2) / 2.
    state.bound += 0x1p-51 * (static_cast<double>(book_.d) + 8) * (state.norm2 + known_.max_bias);
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
    return rung_ == kDifference ? -distance : 0.5 * (state.norm2 - distance * known_.scale * known_.scale);
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

  void score_group(int32_t group, Leader* leader, Stats* stats) const {
    stats->codes += isa_.vectors * span_;
    const int64_t block = group / isa_.lanes, lane = group % isa_.lanes;
    for (int64_t panel = block * span_; panel < std::min(book_.panels, (block + 1) * span_); ++panel) {
      const int64_t first = panel * panel_ + lane * isa_.vectors;
      if (first < book_.k) leader->score(first, std::min(book_.k, first + isa_.vectors));
    }
  }

  // Moves the place of the largest of the groups listed at `from` and later to `from`.
  void bring_largest(const int32_t* groups, int64_t from, int64_t found) {
    int64_t best = from;
    for (int64_t i = from + 1; i < found; ++i)
      if (groups[list_[i]] > groups[list_[best]]) best = i;
    std::swap(list_[from], list_[best]);
  }

  int64_t list_groups(const int32_t* groups, double least_score, const RowState& state) {
    return isa_.collect(groups, groups_per_row_, threshold_for(least_score, state), list_.get(), kCapacity);
  }

  // Scores the groups that can hold the answer; false: too many, or float32 cannot tell.
  bool score_groups(int64_t r, Leader* leader, Stats* stats) {
    const RowState& state = state_[r];
    if (!state.usable) return false;
    const int32_t* groups = groups_.get() + r * groups_per_row_;
    const double bar = score_of(isa_.largest(groups, groups_per_row_, query_.margin), state);
    if (rung_ == kDifference && !(bar > -1e37)) return false;  // overflow
    double least = bar - 2 * bound(bar, state);
    int64_t found = list_groups(groups, least, state);
    if (found > kCapacity) return false;
    int64_t scored = 0;
    const auto score_largest = [&] {
      if (scored == found) return;
      bring_largest(groups, scored, found);
      score_group(list_[scored++], leader, stats);
    };
    score_largest();
    if (query_.margin) score_largest();
    if (!(leader->limit() < kInfinity)) return false;
    double score = true_score(leader->limit(), state);
    if (score - bound(score, state) < least) {  // the codes scored so far are repetitions of each other
      least = score - bound(score, state);
      found = list_groups(groups, least, state);
      scored = 0;
      if (found > kCapacity) return false;
    }
    double limit = leader->limit();
    int32_t threshold = threshold_for(score - bound(score, state), state);
    for (; scored < found; ++scored) {
      if (groups[list_[scored]] < threshold) continue;
      score_group(list_[scored], leader, stats);
      if (!query_.margin || leader->limit() == limit) continue;
      limit = leader->limit();
      score = true_score(limit, state);
      threshold = threshold_for(score - bound(score, state), state);
    }
    return true;
  }

  void select(int64_t row, int64_t r, Stats* stats) {
    Leader leader(query_, row);
    const bool certain = score_groups(r, &leader, stats);
    if (!certain) stats->codes += book_.k;
    certain ? leader.store(stats) : search_in_full(query_, known_.only, row, stats);
  }

  static constexpr int kScales = 2049;  // exponent and three bits of mantissa of a positive float32
  const Query& query_;
  const Codebook& book_;
  const Summary& known_;
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

// A few rows spread over all of them, and the others in order.
struct Sample {
  int64_t count, stride;  // rows 0, stride, 2 stride, ..., `count` of them
  int64_t row(int64_t i) const { return i * stride; }
  int64_t other(int64_t i) const { return i < count * (stride - 1) ? i + i / (stride - 1) + 1 : i + count; }
};

Stats search_rung(const Query& query, Codebook& book, int rung, Sample done = {0, 2}) {
  const Summary& known = book.summary(query.codes, query.threads);
  const Pack& pack = book.pack(query.codes, rung, query.threads);
  Query rest = query;
  rest.n -= done.count;
  const int64_t block = block_rows(rest.n, query.threads);
  return over_blocks(
      rest, block, [&] { return std::make_unique<BlockSearch>(query, book, known, pack, rung, block); },
      [done](BlockSearch& search, int64_t first, int64_t last) {
        return search.run(last - first, [first, done](int64_t r) { return done.other(first + r); });
      });
}

Stats search_all_in_full(const Query& query, const Summary& known) {
  return over_blocks(
      query, 1, [] { return std::make_unique<int>(); },
      [&](int, int64_t first, int64_t) {
        Stats stats;
        search_in_full(query, known.only, first, &stats);
        return stats;
      });
}

// The next rung with a tighter bound, but for one that takes as long as float32.
int next_rung(const Isa& isa, int rung) {
  const float* cycles = isa.choice.cycles;
  for (++rung; rung < kRungs; ++rung)
    if (isa.has[rung] && (rung >= kFloat32 || cycles[rung] < cycles[kFloat32])) break;
  return rung;
}

// The next rung if its slower pass costs less than what this rung leaves to score in double precision, else this rung.
int better_rung(const Codebook& book, int rung, const Stats& stats) {
  const double products = static_cast<double>(book.k) * static_cast<double>(book.d);
  const double scored = stats.rows ? static_cast<double>(stats.codes) / static_cast<double>(stats.rows) : 0;
  const double excess = (scored - 2.0 * book.isa->vectors) * (0.5 * static_cast<double>(book.d) + 48);
  const int next = next_rung(*book.isa, rung);
  if (next == kRungs || (next == kDifference && book.dtype != TMM_F32)) return rung;  // it needs the values themselves
  return excess > products * static_cast<double>(book.isa->choice.cycles[next] - book.isa->choice.cycles[rung]) ? next : rung;
}

int lowest_rung(const Codebook& book, bool margins) {
  const int known = book.rung[margins].load(std::memory_order_relaxed);
  if (known >= 0) return known;
  if (book.isa->has[kInt8] && book.d <= kMaxInt8Dim) return kInt8;
  return book.d < 1000000 ? next_rung(*book.isa, kInt8) : kFloat32;
}

void raise_rung(std::atomic<int>* rung, int least) {
  int known = rung->load(std::memory_order_relaxed);
  while (known < least && !rung->compare_exchange_weak(known, least, std::memory_order_relaxed)) {
  }
}

// Answers the rows of a sample, which show what a rung leaves to score.
Stats probe(const Query& query, Codebook& book, int rung, Sample sample) {
  BlockSearch search(query, book, book.summary(query.codes, query.threads), book.pack(query.codes, rung, query.threads), rung, sample.count);
  return search.run(sample.count, [sample](int64_t r) { return sample.row(r); });
}

Stats search_ladder(const Query& query, Codebook& book, int* method) {
  const bool margins = query.margin != nullptr;
  int rung = lowest_rung(book, margins);
  Sample sample{0, 2};
  Stats stats;
  if (query.n >= kLeastProbed) {
    sample.count = std::min<int64_t>(kProbeRows, query.n / 4 / kTileRows * kTileRows);
    sample.stride = query.n / sample.count;
    for (int better = rung;; rung = better) {
      stats = probe(query, book, rung, sample);
      better = better_rung(book, rung, stats);
      if (better == rung) break;
    }
  }
  stats.add(search_rung(query, book, rung, sample));
  raise_rung(&book.rung[margins], sample.count ? rung : better_rung(book, rung, stats));
  *method = TMM_INT8 + rung;
  return stats;
}

// The box tree wins for few dimensions and many codes, once enough rows have come to pay for its making.
bool wants_tree(const Query& query, Codebook& book, const Summary& known) {
  const TreeChoice& from = book.isa->choice.tree;
  if (query.z.dtype != TMM_F32 || query.codes.d > from.most_dims || known.usable < from.codes) return false;
  const int64_t before = book.rows.fetch_add(std::min<int64_t>(query.n, from.rows), std::memory_order_relaxed);
  return before + query.n >= from.rows;
}

Stats search(const Query& query, Codebook& book) {
  const Summary& known = book.summary(query.codes, query.threads);
  Stats stats;
  if (!known.finite) {
    stats.bad_codes = true;
    return stats;
  }
  int method = book.method;
  if (!known.representable || known.usable <= 1) {
    method = TMM_BRUTE;
    stats = search_all_in_full(query, known);
  } else if (method == TMM_BRUTE) {
    stats = search_live(query);
  } else if (method == TMM_TREE || (method == TMM_AUTO && wants_tree(query, book, known))) {
    method = TMM_TREE;
    stats = search_tree(query, known, book.box_tree(query.codes, query.threads));
  } else if (method == TMM_AUTO) {
    stats = search_ladder(query, book, &method);
  } else {
    stats = search_rung(query, book, method - TMM_INT8);
  }
  delay_hook();
  book.last_method.store(method, std::memory_order_relaxed);
  return stats;
}

// Threads worth waking for so many multiply-adds.
int useful_threads(int threads, int64_t n, int64_t k, int64_t d) {
  const double work = static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(d);
  return std::min(threads, 1 + static_cast<int>(std::min(work / (1 << 19), 1e6)));
}

}  // namespace
}  // namespace tmm

int tmm_nearest_code(tmm_codebook* handle, const void* codes, const void* z, int64_t n, int64_t* ids, void* distance, void* margin,
                     int threads) {
  auto* book = reinterpret_cast<tmm::Codebook*>(handle);
  if (!book || n < 0 || threads < 1) return TMM_BAD_ARGUMENT;
  if (n == 0) return TMM_OK;
  try {
    const tmm::Rows rows{codes, book->dtype, book->d}, queries{z, book->dtype, book->d};
    const tmm::Query query{book->isa, rows,   queries, book->k, n, ids, distance,
                           margin,    tmm::useful_threads(threads, n, book->k, book->d)};
    return tmm::search(query, *book).status();
  } catch (const std::bad_alloc&) {
    return TMM_NO_MEMORY;
  }
}

int tmm_nearest_code_live(const void* codes, int64_t k, int64_t d, int dtype, const void* z, int64_t n, int64_t* ids,
                          void* distance, void* margin, int threads) {
  if (k < 1 || d < 1 || n < 0 || threads < 1 || dtype < TMM_F32 || dtype > TMM_F64) return TMM_BAD_ARGUMENT;
  if (n == 0) return TMM_OK;
  try {
    const tmm::Query query{tmm::current_isa(), {codes, dtype, d}, {z, dtype, d}, k, n, ids, distance, margin,
                           tmm::useful_threads(threads, n, k, d)};
    return tmm::search_live(query).status();
  } catch (const std::bad_alloc&) {
    return TMM_NO_MEMORY;
  }
}
