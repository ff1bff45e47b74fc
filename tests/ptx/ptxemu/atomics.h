// Changes of global memory that other blocks see, and fences.
#pragma once
#include "machine.h"

u64 address_of(Warp& warp, const Instruction& i, const Operand& operand, int lane);  // together.cpp

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, u32, u64>;

// atom and red: operands old value, address, b, c. Lanes one after another, from the last where the order is turned round.
template <class T, class F>
static void atomic(Warp& warp, const Instruction& i, u32 mask) {
    Machine& m = *warp.machine;
    warp.require_known(i.operand[1], mask, "an address");
    for (u32 k = 2; k < i.count; ++k) warp.require_known(i.operand[k], mask, "an operand of an atomic operation");
    for (int n = 0; n < LANES; ++n) {
        const int lane = m.order == 1 ? LANES - 1 - n : n;
        if (!(mask >> lane & 1)) continue;
        const u64 address = address_of(warp, i, i.operand[1], lane);
        m.acquire(warp, address, u32(i.number[3]));
        T old;
        if (!m.read_global(warp, lane, address, sizeof(T), &old, false, true))
            m.fault("uninitialised", warp, lane, "changes global memory that holds no value");
        const T b = std::bit_cast<T>(warp.lanes<Bits<T>>(i.operand[2])[lane]);
        const T c = i.count > 3 ? std::bit_cast<T>(warp.lanes<Bits<T>>(i.operand[3])[lane]) : T();
        const T made = F{}(old, b, c);
        m.write_global(warp, lane, address, sizeof(T), &made, true);
        m.release(warp, address, u32(i.number[3]), true);
        warp.lanes<Bits<T>>(i.operand[0])[lane] = std::bit_cast<Bits<T>>(old);
    }
    warp.set_known(i.operand[0], mask, ALL);
}
#define ATOMIC(name, T, value)                                                                       \
    Opcode{"atom." name, "", STRONG, nullptr, [](Warp& warp, const Instruction& i, u32 mask) {       \
               const auto of = [](T a, T b, [[maybe_unused]] T c) -> T { return T(value); };         \
               atomic<T, decltype(of)>(warp, i, mask);                                               \
           }},
#define ATOMICS(N, U, S)                                                                             \
    ATOMIC("add.u" N, U, a + b)                                                                      \
    ATOMIC("add.s" N, U, a + b)                                                                      \
    ATOMIC("min.u" N, U, a < b ? a : b)                                                              \
    ATOMIC("min.s" N, S, a < b ? a : b)                                                              \
    ATOMIC("max.u" N, U, a > b ? a : b)                                                              \
    ATOMIC("max.s" N, S, a > b ? a : b)                                                              \
    ATOMIC("and.b" N, U, a & b)                                                                      \
    ATOMIC("or.b" N, U, a | b)                                                                       \
    ATOMIC("xor.b" N, U, a ^ b)                                                                      \
    ATOMIC("exch.b" N, U, (void(a), b))                                                              \
    ATOMIC("cas.b" N, U, a == b ? c : a)

static void fence(Warp& warp, const Instruction&, u32) {
    if (warp.machine->meeting) warp.fence();
}
static void nothing(Warp&, const Instruction&, u32) {}
