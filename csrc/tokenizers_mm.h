// C interface of libtokenizers_mm: raw pointers and sizes only, so that one library serves every Python and every torch.
#ifndef TOKENIZERS_MM_H
#define TOKENIZERS_MM_H

#include <stdint.h>

#if defined(__GNUC__)
#define TMM_API __attribute__((visibility("default")))
#else
#define TMM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TMM_ABI_VERSION 1

enum { TMM_OK = 0, TMM_STALE = 1, TMM_NO_MEMORY = 2, TMM_BAD_ARGUMENT = 3 };
enum { TMM_F32 = 0, TMM_F64 = 1 };
// AUTO lets a probe choose. The others pin one method: they exist for tests and for measuring.
enum { TMM_AUTO = 0, TMM_INT8 = 1, TMM_INT16 = 2, TMM_FLOAT32 = 3, TMM_DIFFERENCE = 4, TMM_TREE = 5, TMM_BRUTE = 6 };

typedef struct tmm_codebook tmm_codebook;

TMM_API int tmm_abi_version(void);
// The instruction set in use: "avx512_vnni", "avx_vnni", "avx2" or "portable".
TMM_API const char* tmm_isa(void);
// Pins the instruction set of codebooks created from now on; TMM_BAD_ARGUMENT when this CPU lacks it. For tests.
TMM_API int tmm_select_isa(const char* name);

// A packed codebook of k rows of d values. Nothing is packed before the first search and no pointer into `codes` is kept.
TMM_API tmm_codebook* tmm_codebook_create(int64_t k, int64_t d, int dtype, int method);
TMM_API void tmm_codebook_destroy(tmm_codebook* codebook);
TMM_API int64_t tmm_codebook_bytes(const tmm_codebook* codebook);
// The method of the last search (one of the enum above).
TMM_API int tmm_codebook_method(const tmm_codebook* codebook);

// ids[i] = argmin_k ||z_i - c_k||^2, ties to the lowest k; distance (may be null) gets the squared distance in the given
// dtype. z and codes are row-major and contiguous, both of the dtype named at creation. TMM_STALE: `codes` is no longer what
// was packed; destroy the codebook, create it again and repeat the call.
TMM_API int tmm_nearest_code(tmm_codebook* codebook, const void* codes, const void* z, int64_t n, int64_t* ids,
                             void* distance, int threads);

// counts[k] = #{i: ids[i] = k}; sums[k] = sum of those rows, added in the order of i in double precision.
// TMM_BAD_ARGUMENT when an id is outside [0, k).
TMM_API int tmm_code_sums(const void* vectors, int dtype, const int64_t* ids, int64_t n, int64_t d, int64_t k,
                          int64_t* counts, double* sums, int threads);

#ifdef __cplusplus
}
#endif
#endif
