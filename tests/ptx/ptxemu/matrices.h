// The meaning of ldmatrix and mma: fragments of matrices, spread over a warp's registers.
#pragma once
#include "machine.h"

u64 address_of(Warp& warp, const Instruction& i, const Operand& operand, int lane);

// operands: 1, 2 or 4 results, the address; number: matrices, transposed, offset.
inline void load_matrices(Warp& warp, const Instruction& i, u32 mask) {
    const u32 count = u32(i.number[0]);
    const bool transposed = i.number[1] != 0;
    u16 matrix[4][8][8];
    bool known[4][8];
    warp.require_known(i.operand[count], count == 4 ? mask : (1u << 8 * count) - 1, "an address");
    for (u32 k = 0; k < count * 8; ++k)
        known[k / 8][k % 8] =
            warp.machine->read_shared(warp, int(k), address_of(warp, i, i.operand[count], int(k)), 16, matrix[k / 8][k % 8]);
    for (u32 k = 0; k < count; ++k) {
        u32 valued = 0;
        for (int lane = 0; lane < LANES; ++lane) {
            const int row = lane / 4, column = lane % 4 * 2;
            const u32 low = transposed ? matrix[k][column][row] : matrix[k][row][column];
            const u32 high = transposed ? matrix[k][column + 1][row] : matrix[k][row][column + 1];
            warp.lanes<u32>(i.operand[k])[lane] = low | high << 16;
            valued |= u32(transposed ? known[k][column] && known[k][column + 1] : known[k][row]) << lane;
        }
        warp.set_known(i.operand[k], mask, valued);
    }
}

// D = A B + C with the fragments of PTX's m16n8k16 (16 bits), m16n8k8 (16 bits, tf32) and m8n8k4 (float64).
// Products are exact. Sums of 8 products (tf32: 4) and the accumulator are rounded once, towards zero, as they were
// measured to be on sm_80; float64 is a chain of fma.
template <class T>
f32 as_float(u32 bits);
template <>
inline f32 as_float<bf16>(u32 bits) { return widened(bf16{u16(bits)}); }
template <>
inline f32 as_float<f16>(u32 bits) { return f32(std::bit_cast<f16>(u16(bits))); }
struct tf32 {};
template <>
inline f32 as_float<tf32>(u32 bits) { return std::bit_cast<f32>(bits & 0xffffe000u); }

template <class T, int K>
void multiply(Warp& warp, const Instruction& i, u32 mask) {
    constexpr bool halves = !std::is_same_v<T, tf32>;
    constexpr int A = K * (halves ? 2 : 4) / 8, B = A / 2, STEP = halves ? 8 : 4;
    f32 a[16][K], b[8][K];
    bool row_known[16], column_known[8];
    std::fill_n(row_known, 16, true), std::fill_n(column_known, 8, true);
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane / 4, place = lane % 4;
        for (int r = 0; r < A; ++r) {
            const u32 bits = warp.lanes<u32>(i.operand[4 + r])[lane];
            const int row = group + 8 * (r & 1);
            row_known[row] &= warp.known[i.operand[4 + r].id] >> lane & 1;
            if constexpr (halves) {
                const int k = place * 2 + 8 * (r >> 1);
                a[row][k] = as_float<T>(bits & 0xffff), a[row][k + 1] = as_float<T>(bits >> 16);
            } else {
                a[row][place + 4 * (r >> 1)] = as_float<T>(bits);
            }
        }
        for (int r = 0; r < B; ++r) {
            const u32 bits = warp.lanes<u32>(i.operand[4 + A + r])[lane];
            column_known[group] &= warp.known[i.operand[4 + A + r].id] >> lane & 1;
            if constexpr (halves) {
                const int k = place * 2 + 8 * r;
                b[group][k] = as_float<T>(bits & 0xffff), b[group][k + 1] = as_float<T>(bits >> 16);
            } else {
                b[group][place + 4 * r] = as_float<T>(bits);
            }
        }
    }
    f32 result[4][LANES];
    u32 known[4] = {};
    for (int lane = 0; lane < LANES; ++lane)
        for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + 8 * (r >> 1), column = lane % 4 * 2 + (r & 1);
            f32 sum = warp.lanes<f32>(i.operand[4 + A + B + r])[lane];
            for (int k = 0; k < K; k += STEP) {
                f64 exact = sum;
                for (int j = k; j < k + STEP; ++j) exact += f64(a[row][j]) * f64(b[column][j]);
                sum = truncated(exact);
            }
            result[r][lane] = sum;
            known[r] |= (u32(row_known[row] && column_known[column]) & warp.known[i.operand[4 + A + B + r].id] >> lane)
                        << lane;
        }
    for (int r = 0; r < 4; ++r) {
        std::memcpy(warp.lanes<f32>(i.operand[r]), result[r], sizeof result[r]);
        warp.set_known(i.operand[r], mask, known[r]);
    }
}
inline void multiply_f64(Warp& warp, const Instruction& i, u32 mask) {
    f64 result[2][LANES];
    const f64 *a = warp.lanes<f64>(i.operand[2]), *b = warp.lanes<f64>(i.operand[3]);
    u32 known[2] = {};
    for (int lane = 0; lane < LANES; ++lane)
        for (int r = 0; r < 2; ++r) {
            const int row = lane / 4, column = lane % 4 * 2 + r;
            f64 sum = warp.lanes<f64>(i.operand[4 + r])[lane];
            u32 valued = warp.known[i.operand[4 + r].id] >> lane & 1;
            for (int k = 0; k < 4; ++k) {
                sum = std::fma(a[row * 4 + k], b[column * 4 + k], sum);
                valued &= warp.known[i.operand[2].id] >> (row * 4 + k) & warp.known[i.operand[3].id] >> (column * 4 + k);
            }
            result[r][lane] = sum;
            known[r] |= (valued & 1) << lane;
        }
    for (int r = 0; r < 2; ++r) {
        std::memcpy(warp.lanes<f64>(i.operand[r]), result[r], sizeof result[r]);
        warp.set_known(i.operand[r], mask, known[r]);
    }
}
