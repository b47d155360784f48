// Measures the images of a file through the C interface: how test_arm64.py sees a library that this Python cannot load.
// Usage: ssim_case ISA CASE ANSWER. CASE: int64 {planes, height, width, k}, double line[k], float x[planes][height][width], y.
// ANSWER: double whole[planes], contrast[planes], by one thread, and the same by three.
#include <cstdio>
#include <vector>

#include "tokenizers_mm.h"

template <class T>
bool read(std::FILE* in, std::vector<T>& values) { return std::fread(values.data(), sizeof(T), values.size(), in) == values.size(); }

int main(int argc, char** argv) {
  if (argc != 4 || tmm_select_isa(argv[1]) != TMM_OK) return 2;
  std::FILE *in = std::fopen(argv[2], "rb"), *out = std::fopen(argv[3], "wb");
  std::vector<int64_t> head(4);
  if (!in || !out || !read(in, head)) return 2;
  std::vector<double> line(head[3]), found(2 * head[0]);
  std::vector<float> x(head[0] * head[1] * head[2]), y(x.size());
  if (!read(in, line) || !read(in, x) || !read(in, y)) return 2;
  for (int threads : {1, 3}) {
    const int status = tmm_ssim(x.data(), y.data(), TMM_F32, head[0], head[1], head[2], line.data(), head[3], 1e-4, 9e-4, 0.5, found.data(),
                                found.data() + head[0], threads);
    if (status != TMM_OK || std::fwrite(found.data(), sizeof(double), found.size(), out) != found.size()) return 1;
  }
  std::fclose(out);
  std::puts(tmm_isa());
}
