// Races the CPU library against itself: several threads pack, search, measure and free the same codebooks, which are rewritten
// between searches, with a random delay wherever another thread may come in between. Built by test_sanitizers.py with one of
// gcc's sanitizers. Prints "ok" when every answer was right.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <shared_mutex>
#include <thread>
#include <vector>

#include "tokenizers_mm.h"

namespace tmm {
void delay_hook() {
  thread_local std::minstd_rand random(static_cast<unsigned>(reinterpret_cast<uintptr_t>(&random) >> 6));
  if (random() % 2) usleep(random() % 300);
}
}  // namespace tmm

namespace {

constexpr int kThreads = 6;
const int64_t kRows[kThreads] = {1, 40, 3, 100, 1, 33};
std::atomic<int> failures{0};

// One content of a codebook, as a caller keeps it: values, handle, and what the searches must find.
struct Content {
  Content(int64_t k, int64_t d, int method, const std::vector<float>& z, unsigned seed) : codes(k * d), ids(z.size() / d) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& value : codes) value = normal(random);
    for (int64_t i = 0; i < d; ++i) codes[i + (k - 1) * d] = codes[i];  // a repetition
    handle = tmm_codebook_create(k, d, TMM_F32, method);
    for (size_t row = 0; row < ids.size(); ++row) {
      double best = 1e300;
      for (int64_t code = 0; code < k; ++code) {
        double sum = 0;
        for (int64_t i = 0; i < d; ++i) {
          const double gap = static_cast<double>(z[row * d + i]) - static_cast<double>(codes[code * d + i]);
          sum += gap * gap;
        }
        if (sum < best) best = sum, ids[row] = code;
      }
    }
  }
  ~Content() { tmm_codebook_destroy(handle); }
  std::vector<float> codes;
  std::vector<int64_t> ids;
  tmm_codebook* handle;
};

void expect(bool right, const char* what) {
  if (!right && failures++ == 0) std::fprintf(stderr, "wrong: %s\n", what);
}

void search(const Content& content, int64_t d, const std::vector<float>& z, int64_t n, bool live, int threads) {
  std::vector<int64_t> ids(n);
  std::vector<float> distance(n), margin(n);
  const bool more = n % 2 == 0;
  const int64_t k = static_cast<int64_t>(content.codes.size()) / d;
  const int status =
      live ? tmm_nearest_code_live(content.codes.data(), k, d, TMM_F32, z.data(), n, ids.data(), distance.data(),
                                   more ? margin.data() : nullptr, threads)
           : tmm_nearest_code(content.handle, content.codes.data(), z.data(), n, ids.data(), distance.data(),
                              more ? margin.data() : nullptr, threads);
  expect(status == TMM_OK, "status");
  for (int64_t row = 0; row < n; ++row) expect(ids[row] == content.ids[row], "id");
}

void race(int64_t k, int64_t d, int method, int rounds) {
  std::vector<float> z(128 * d);
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (float& value : z) value = normal(random);
  std::shared_mutex guard;  // callers must not write to a codebook during a search; this is how this caller keeps to that
  auto content = std::make_shared<Content>(k, d, method, z, 0);
  for (int round = 0; round < rounds; ++round) {
    std::atomic<int> ready{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t)
      threads.emplace_back([&, t] {
        for (++ready; ready < kThreads;) {
        }
        for (int call = 0; call < 4; ++call) {
          if (t == 2 && call == 2) {
            auto next = std::make_shared<Content>(k, d, method, z, 1000 * round + call);
            std::unique_lock<std::shared_mutex> lock(guard);
            content = next;
            continue;
          }
          std::shared_lock<std::shared_mutex> lock(guard);
          const std::shared_ptr<Content> now = content;
          lock.unlock();
          search(*now, d, z, kRows[(t + call) % kThreads], false, 1 + t % 3);
          expect(tmm_codebook_bytes(now->handle) > 0, "bytes");
          expect(tmm_codebook_method(now->handle) >= TMM_AUTO, "method");
          if (t == 1) search(*now, d, z, 2, true, 2);
          if (t == 3) {
            uint64_t one[2], other[2];
            tmm_digest(now->codes.data(), k, d * 4, d * 4, one, 1);
            tmm_digest(now->codes.data(), k, d * 4, d * 4, other, 3);
            expect(one[0] == other[0] && one[1] == other[1], "digest");
            std::vector<int64_t> counts(k);
            std::vector<double> sums(k * d);
            expect(tmm_code_sums(z.data(), TMM_F32, now->ids.data(), 128, d, k, counts.data(), sums.data(), 3) == TMM_OK, "sums");
          }
        }
      });
    for (std::thread& thread : threads) thread.join();
    content = std::make_shared<Content>(k, d, method, z, round);  // the next round packs again
  }
}

// Pairs of images by one thread and by several, in memory that ends where they do.
void compare_images() {
  const std::vector<double> line = {0.1, 0.2, 0.4, 0.2, 0.1};
  std::vector<float> x(3 * 40 * 139), y(x.size());
  std::minstd_rand random(1);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random() % 256), y[i] = static_cast<float>(random() % 256);
  std::vector<double> one(6), several(6);
  for (int threads : {1, 3}) {
    double* to = (threads == 1 ? one : several).data();
    expect(tmm_ssim(x.data(), y.data(), TMM_F32, 3, 40, 139, line.data(), 5, 6.5, 58.5, 0, to, to + 3, threads) == TMM_OK, "ssim");
  }
  expect(one == several, "ssim by threads");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 6;
  for (const char* isa : {"avx512_amx", "avx512_vnni", "avx_vnni", "avx2", "neon_i8mm", "neon_dot", "neon", "portable"}) {
    if (tmm_select_isa(isa) != TMM_OK) continue;
    compare_images();
    race(700, 8, TMM_AUTO, rounds);    // the box tree
    race(300, 32, TMM_AUTO, rounds);   // the ladder
    race(300, 70, TMM_AUTO, rounds);   // and some dimensions in 16 bits
    race(90, 5, TMM_BRUTE, rounds);
  }
  if (failures) return 1;
  std::puts("ok");
  return 0;
}
