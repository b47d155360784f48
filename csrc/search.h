// Common parts of the ways of searching: the query, the codes that lead, how a row's answer is stored, how blocks of
// rows are handed to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <mutex>
#include <new>

#include "codebook.h"
#include "pool.h"
#include "rows.h"

namespace tmm {

struct Query {
  const Isa* isa;
  Rows codes, z;
  int64_t k, n;
  int64_t* ids;
  void* distance;
  void* margin;
  int threads;
};

constexpr int64_t kCapacity = 4096;  // candidates kept for a row; more, and the row is searched in full
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Stats {
  int64_t rows = 0, codes = 0;  // rows searched; codes scored in double precision for them
  bool bad_codes = false, bad_query = false;
  void add(const Stats& other) {
    rows += other.rows;
    codes += other.codes;
    bad_codes = bad_codes || other.bad_codes;
    bad_query = bad_query || other.bad_query;
  }
  int status() const { return bad_codes ? TMM_BAD_CODES : bad_query ? TMM_BAD_QUERY : TMM_OK; }
};

// The nearest of the codes scored so far for one row and, where margins are wanted, the distance of the nearest one of another
// value. Distances are those in double precision and in the difference form.
class Leader {
 public:
  Leader(const Query& query, int64_t row) : query_(&query), row_(row) {}

  void score(int64_t first, int64_t last) {
    if (!query_->margin) return query_->codes.score(*query_->isa, query_->z, row_, first, last, &best_);
    double distance[kScored];
    for (; first < last; first += kScored) {
      const int64_t count = std::min(kScored, last - first);
      if (!query_->codes.distances(*query_->isa, query_->z, row_, first, count, second_, distance)) continue;
      if (count == kScored && offer_four(distance, first)) continue;
      for (int64_t i = 0; i < count; ++i) offer({distance[i], first + i});
    }
  }

  // The leader over what both have scored.
  void merge(const Leader& other) {
    offer(other.best_);
    second_ = std::min(second_, other.second_);  // its code can only be the best one again where the margin is zero anyway
  }

  bool found() const { return best_.distance < kInfinity; }
  // True if the best value was met twice, or nothing but it.
  bool repeated() const { return repeated_ || !(second_ < kInfinity); }
  // No code farther away than this can change the answer.
  double limit() const { return query_->margin ? second_ : best_.distance; }

  // Without a finite distance: index 0 and infinity where the values are finite (overflow), else -1 and NaN.
  void store(Stats* stats) const {
    const bool bad = !found() && !query_->z.finite(row_);
    stats->bad_query = stats->bad_query || bad;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    query_->ids[row_] = bad ? -1 : best_.index;
    if (query_->distance) put(query_->distance, bad ? nan : best_.distance);
    if (query_->margin) put(query_->margin, bad ? nan : margin());
  }

 private:
  static constexpr int64_t kScored = 4;  // at a time

  // The same as offering each, without branches that nobody could guess; false: some are equal, and none was offered.
  bool offer_four(const double* distance, int64_t first) {
    const double low = std::min(distance[0], distance[1]), high = std::max(distance[0], distance[1]);
    const double other_low = std::min(distance[2], distance[3]), other_high = std::max(distance[2], distance[3]);
    const double least = std::min(low, other_low);
    const double second = std::min(std::max(low, other_low), std::min(high, other_high));
    if (least == second || least == best_.distance) return false;
    const int at = low < other_low ? distance[1] < distance[0] : 2 + (distance[3] < distance[2]);
    second_ = std::min(second_, second);
    offer({least, first + at});
    return true;
  }

  void offer(const Best& code) {
    if (code.distance == best_.distance) return tie(code.index);
    const bool nearer = code.distance < best_.distance;
    second_ = std::min(second_, nearer ? best_.distance : code.distance);
    best_ = {nearer ? code.distance : best_.distance, nearer ? code.index : best_.index};
  }

  void tie(int64_t index) {
    if (!found()) return;
    if (query_->codes.equal(index, best_.index)) {
      repeated_ = true;
    } else {
      second_ = best_.distance;
    }
    best_.index = std::min(best_.index, index);
  }

  double margin() const {
    if (!(second_ < kInfinity)) return found() ? kInfinity : 0.0;
    return second_ > best_.distance ? (second_ - best_.distance) / (std::sqrt(second_) + std::sqrt(best_.distance)) : 0.0;
  }

  void put(void* out, double value) const {
    if (query_->z.dtype == TMM_F64) {
      static_cast<double*>(out)[row_] = value;
    } else {
      static_cast<float*>(out)[row_] = static_cast<float>(value);
    }
  }

  const Query* query_;
  int64_t row_;
  Best best_ = {kInfinity, 0};
  double second_ = kInfinity;
  bool repeated_ = false;
};

// Scores every code, or the only one that is not a repetition.
inline void search_in_full(const Query& query, int64_t only, int64_t row, Stats* stats) {
  Leader leader(query, row);
  only < 0 ? leader.score(0, query.k) : leader.score(only, only + 1);
  leader.store(stats);
}

// Calls body(worker-local object, first, last) over blocks of rows.
template <class Make, class Body>
Stats over_blocks(const Query& query, int64_t block, Make make, Body body) {
  std::atomic<int64_t> next{0};
  std::mutex merge;
  Stats total;
  bool no_memory = false;
  auto work = [&](int) {
    Stats mine;
    bool failed = false;
    try {
      auto local = make();
      for (;;) {
        const int64_t first = next.fetch_add(block);
        if (first >= query.n) break;
        mine.add(body(*local, first, std::min(query.n, first + block)));
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    std::lock_guard<std::mutex> lock(merge);
    total.add(mine);
    no_memory = no_memory || failed;
  };
  run_parallel(static_cast<int>(std::min<int64_t>(query.threads, (query.n + block - 1) / block)), work);
  if (no_memory) throw std::bad_alloc();
  return total;
}

Stats search_tree(const Query& query, const Summary& known, const Tree& tree);
Stats search_live(const Query& query);

}  // namespace tmm
