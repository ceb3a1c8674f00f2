// Products of small row-major matrices on one thread, for kernels that work on tiles: torch's own micro-kernels.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace lightkit::cpu {

// C = A B, or C += A B with `accumulate`: A is (m, k), B (k, n) and C (m, n), their rows `lda`, `ldb`, `ldc` apart.
// What an element of C becomes does not depend on m and n.
//
// To be called inside at::parallel_for or by one thread; the threads of a BLAS stay out of it.
void tile_gemm(
    int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
    bool accumulate);
void tile_gemm(
    int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c, int64_t ldc,
    bool accumulate);

// B holds pairs of rows: (k / 2, n, 2), pairs `2 * ldb` apart; k is even.
void tile_gemm(
    int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool accumulate);

// Whether this machine multiplies bfloat16 natively. Elsewhere the product above must not be called.
bool has_bfloat16_gemm();

// What a thread calls after its last product of a kind: AMX keeps its registers until then.
void end_tile_gemm();

}  // namespace lightkit::cpu
