// What the ways of searching share: the query, how a row's answer is stored, how blocks of rows are handed to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>
#include <new>

#include "codebook.h"
#include "pool.h"

namespace tmm {

struct Query {
  Codebook* book;
  Rows codes, z;
  int64_t n;
  int64_t* ids;
  void* distance;
  int threads;
};

constexpr int64_t kCapacity = 4096;  // candidates kept for a row; more, and the row is searched in full
constexpr Best kNothing = {std::numeric_limits<double>::infinity(), 0};

struct Stats {
  int64_t rows = 0, codes = 0;  // rows searched; codes scored in double precision for them
  bool stale = false;
  void add(const Stats& other) {
    rows += other.rows;
    codes += other.codes;
    stale = stale || other.stale;
  }
};

// No finite distance: index 0 and NaN.
inline void store(const Query& query, int64_t row, const Best& best) {
  query.ids[row] = best.index;
  if (!query.distance) return;
  const double d = best.distance < kNothing.distance ? best.distance : std::numeric_limits<double>::quiet_NaN();
  if (query.z.dtype == TMM_F64) {
    static_cast<double*>(query.distance)[row] = d;
  } else {
    static_cast<float*>(query.distance)[row] = static_cast<float>(d);
  }
}

inline void search_in_full(const Query& query, int64_t row) {
  Best best = kNothing;
  const int64_t only = query.book->only;
  query.codes.score(*query.book->isa, query.z, row, only < 0 ? 0 : only, only < 0 ? query.book->k : only + 1, &best);
  store(query, row, best);
}

// Calls body(first, last, worker-local object) over blocks of rows.
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
        if (first >= query.n || mine.stale) break;
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

Stats search_tree(const Query& query, const Tree& tree);

}  // namespace tmm
