// A codebook prepared for searching: statistics of its rows, one packed copy per rung used, and a box tree for few dimensions.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "rows.h"
#include "tokenizers_mm.h"

namespace tmm {

// Called where another thread may come in between. The race driver of the tests sleeps in it.
#ifdef TMM_DELAY_HOOK
void delay_hook();
#else
inline void delay_hook() {}
#endif

// A value that is made on first use and never changes after that. It is made outside of any lock, from the codebook alone, and
// the first thread to finish publishes it; a thread that comes second drops its copy. Nobody waits for anybody, so there is no
// lock that a fork could leave behind locked.
template <class T>
class Once {
 public:
  Once() = default;
  Once(const Once&) = delete;
  Once& operator=(const Once&) = delete;
  ~Once() { delete value_.load(std::memory_order_acquire); }
  template <class Make>
  const T& get(Make make) {
    if (const T* ready = peek()) return *ready;
    delay_hook();
    auto made = std::make_unique<T>();
    make(made.get());
    delay_hook();
    T* expected = nullptr;
    if (!value_.compare_exchange_strong(expected, made.get(), std::memory_order_acq_rel, std::memory_order_acquire)) return *expected;
    return *made.release();
  }
  const T* peek() const { return value_.load(std::memory_order_acquire); }

 private:
  std::atomic<T*> value_{nullptr};
};

// Aligned memory that is not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reset(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void reset(int64_t count) {
    std::free(data_);
    data_ = nullptr;
    bytes_ = (count * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t bytes() const { return bytes_; }

 private:
  T* data_ = nullptr;
  int64_t bytes_ = 0;
};

// The rows of a matrix in one of the two source types.
struct Rows {
  const void* data;
  int dtype;
  int64_t d;
  const float* f32(int64_t i) const { return static_cast<const float*>(data) + i * d; }
  const double* f64(int64_t i) const { return static_cast<const double*>(data) + i * d; }
  RowStats centre(const Isa& isa, int64_t i, const float* mean, float scale, float* out) const {
    return dtype == TMM_F64 ? isa.centre_f64(f64(i), mean, scale, d, out) : isa.centre_f32(f32(i), mean, scale, d, out);
  }
  bool finite(int64_t i) const;
  bool equal(int64_t a, int64_t b) const;
  // Scores rows first .. last - 1 against row i of `z`.
  void score(const Isa& isa, const Rows& z, int64_t i, int64_t first, int64_t last, Best* best) const {
    if (first >= last) return;
    dtype == TMM_F64 ? isa.score_f64(z.f64(i), f64(first), last - first, d, first, best)
                     : isa.score_f32(z.f32(i), f32(first), last - first, d, first, best);
  }
  // Squared distances from row i of `z` to `count` rows, at most 4; false: all are above the limit and out is not written.
  bool distances(const Isa& isa, const Rows& z, int64_t i, int64_t first, int64_t count, double limit, double* out) const {
    return dtype == TMM_F64 ? isa.distances_f64(z.f64(i), f64(first), count, d, limit, out)
                            : isa.distances_f32(z.f32(i), f32(first), count, d, limit, out);
  }
  void to_double(int64_t i, double* out) const {
    for (int64_t j = 0; j < d; ++j) out[j] = dtype == TMM_F64 ? f64(i)[j] : static_cast<double>(f32(i)[j]);
  }
};

struct Pack {
  Buffer<int32_t> codes;
  Buffer<float> bias;     // in the order of the panels
  int64_t steps = 0;
  float scale = 1;        // s_c
  double residual = 0;    // max over codes of |c - s_c q|
  // int8: dimensions in the order of the steps; the first `wide`, an even number, are kept in 16 bits (see choose_wide).
  std::vector<int32_t> order;
  int64_t wide = 0;

  int64_t words(int64_t padded) const { return padded + 64; }
  // Reorders x for quantise_mixed: wide values, zero-padded to 16, then the others, zero-padded too. out: words(padded) floats.
  void reorder(const float* x, float* out) const;
  float* narrow(float* ordered) const { return ordered + (wide + 15) / 16 * 16; }
  int64_t narrow_padded() const { return (static_cast<int64_t>(order.size()) - wide + 15) / 16 * 16; }
  QuantStats quantise_mixed(const Isa& isa, float* ordered, float scale, int32_t* words) const;
  // The smallest s for reordered values of a token; |q| <= kWideLevels in the wide dimensions.
  float mixed_scale(const Isa& isa, float* ordered) const;
};

struct Tree {
  TreeView view{};
  GridTree grid{};
  Buffer<float> super_bounds, leaf_bounds, leaf_codes;
  Buffer<int32_t> grid_super_bounds, grid_leaf_bounds, grid_leaf_codes;
  Buffer<int32_t> index;  // slot -> code
};

// Facts about the rows before any packing. Everything is relative to `mean` and multiplied by `scale`, a power of two
// that makes the largest component about 1.
struct Summary {
  std::vector<float> mean;
  std::vector<float> zero;
  float scale = 1;
  double radius = 0;            // max |c|
  double max_bias = 0;          // max |c|^2 / 2
  float largest = 0;            // max |c_j|
  std::vector<float> tops;      // the same for each dimension
  std::vector<float> bias;      // -|c|^2 / 2; -infinity for codes that cannot win: repetitions
  int64_t usable = 0;           // codes that can win
  int64_t only = -1;            // the one that can, if there is just one
  bool finite = true;           // false: NaN or infinity in some row; such a codebook is refused
  bool representable = true;    // false: float32 cannot hold the centred codes; every row is searched in double precision
};

// The codebook of one content. All state is either constant, or a `Once`, or one atomic number.
struct Codebook {
  Codebook(int64_t k, int64_t d, int dtype, int method, const Isa* isa)
      : k(k), d(d), dtype(dtype), method(method), isa(isa), padded((d + 15) / 16 * 16),
        panels((k + isa->lanes * isa->vectors - 1) / (isa->lanes * isa->vectors)) {}

  const int64_t k, d;
  const int dtype, method;
  const Isa* const isa;
  const int64_t padded;         // d rounded up to 16
  const int64_t panels;

  std::atomic<int> rung[2] = {-1, -1};    // lowest rung worth trying, without and with margins
  std::atomic<int64_t> rows{0};           // searched so far, where the box tree may be worth its making
  std::atomic<int> last_method{TMM_AUTO};

  // Every call must pass the rows of the same content.
  const Summary& summary(const Rows& codes, int threads) {
    return summary_.get([&](Summary* made) { summarise(codes, threads, made); });
  }
  const Pack& pack(const Rows& codes, int rung, int threads) {
    const Summary& known = summary(codes, threads);
    return packs_[rung].get([&](Pack* made) { fill(codes, known, rung, threads, made); });
  }
  const Tree& box_tree(const Rows& codes, int threads);
  int64_t bytes() const;

  // Row i as a rung wants it: centred and scaled, or, for the difference rung, as it is.
  RowStats centre(const Summary& known, const Rows& rows, int64_t i, int rung, float* out) const {
    return rung == kDifference ? rows.centre(*isa, i, known.zero.data(), 1.0f, out)
                               : rows.centre(*isa, i, known.mean.data(), known.scale, out);
  }

 private:
  void summarise(const Rows& codes, int threads, Summary* out) const;
  void fill(const Rows& codes, const Summary& known, int rung, int threads, Pack* out) const;
  void find_mean(const Rows& codes, Summary* out) const;
  void choose_wide(const Rows& codes, const Summary& known, Pack* pack) const;
  void drop_repetitions(const Rows& codes, const std::vector<double>& norm2, Summary* out) const;

  Once<Summary> summary_;
  Once<Pack> packs_[kRungs];
  Once<Tree> tree_;
};

void build_tree(const Codebook& codebook, const Summary& known, const Rows& codes, Tree* tree);

// int8 rung: at most kMaxWide products of magnitudes up to kWideLevels stay below 2^28.
constexpr int64_t kMaxWide = 64;
constexpr float kWideLevels = 2047.0f;

// Largest norm of quantised vectors: |q_x| |q_c| <= 2^29 keeps every partial int32 sum of the int16 rung exact.
constexpr double kInt16Norm = 23170.0;

}  // namespace tmm
