// Runs the searches listed in a file through the C interface and writes what they find: how test_arm64.py sees a library that this
// Python cannot load. Usage: search_cases ISA CASES ANSWERS; prints the instruction set, that of the CPU where ISA is "best".
//
// CASES: int64 {k, d, dtype, n, searches}, codes, z, int64 {method (-1: live), threads, margins} of each search, and so on.
// ANSWERS: of each search int64 {status (-1: the instruction set lacks the method), method used}, int64 ids[n], double distance[n],
// double margin[n].
#include <cstdio>
#include <cstring>
#include <vector>

#include "tokenizers_mm.h"

namespace {

std::FILE *in, *out;

template <class T>
bool read(std::vector<T>& values) { return std::fread(values.data(), sizeof(T), values.size(), in) == values.size(); }

void write(const void* data, size_t size, size_t count) {
  if (std::fwrite(data, size, count, out) != count) std::perror("write");
}

template <class T>
int run_case(int64_t k, int64_t d, int dtype, int64_t n, int64_t searches) {
  std::vector<T> codes(k * d), z(n * d), distance(n), margin(n);
  if (!read(codes) || !read(z)) return 1;
  for (int64_t i = 0; i < searches; ++i) {
    std::vector<int64_t> search(3), ids(n, -2);
    if (!read(search)) return 1;
    const int method = static_cast<int>(search[0]), threads = static_cast<int>(search[1]);
    void* wanted = search[2] ? margin.data() : nullptr;
    int64_t done[2] = {-1, method};
    if (method < 0) {
      done[0] = tmm_nearest_code_live(codes.data(), k, d, dtype, z.data(), n, ids.data(), distance.data(), wanted, threads);
    } else if (tmm_codebook* book = tmm_codebook_create(k, d, dtype, method)) {
      done[0] = tmm_nearest_code(book, codes.data(), z.data(), n, ids.data(), distance.data(), wanted, threads);
      done[1] = tmm_codebook_method(book);
      tmm_codebook_destroy(book);
    }
    write(done, sizeof(int64_t), 2);
    write(ids.data(), sizeof(int64_t), ids.size());
    for (const std::vector<T>* values : {&distance, &margin}) {
      const std::vector<double> wide(values->begin(), values->end());
      write(wide.data(), sizeof(double), wide.size());
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 || (std::strcmp(argv[1], "best") != 0 && tmm_select_isa(argv[1]) != TMM_OK)) return 2;
  std::puts(tmm_isa());
  in = std::fopen(argv[2], "rb");
  out = std::fopen(argv[3], "wb");
  if (!in || !out) return 2;
  for (std::vector<int64_t> head(5); read(head);) {
    const int dtype = static_cast<int>(head[2]);
    const int failed = dtype == TMM_F64 ? run_case<double>(head[0], head[1], dtype, head[3], head[4])
                                        : run_case<float>(head[0], head[1], dtype, head[3], head[4]);
    if (failed) return 3;
  }
  return std::fclose(out) == 0 ? 0 : 4;
}
