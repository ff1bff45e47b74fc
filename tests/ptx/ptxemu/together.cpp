// The meaning of instructions that move data or that a warp's lanes do together; opcodes.h has all the others.
#include "atomics.h"
#include "machine.h"
#include "matrices.h"
#include "opcodes.h"

// --- Each lane alone: a loop over the lanes for every line of opcodes.h. A predicate is a bit of a mask. ---

template <class T>
struct Read {
    const T* at;
    Read(u8* file, const Operand& operand) : at(reinterpret_cast<const T*>(file + operand.at)) {}
    T operator[](int lane) const { return at[lane]; }
};
template <>
struct Read<bool> {
    u32 bits;
    Read(u8* file, const Operand& operand) : bits(*reinterpret_cast<const u32*>(file + operand.at)) {}
    bool operator[](int lane) const { return bits >> lane & 1; }
};

template <class R, class V>
static inline void for_lanes(u8* file, const Operand& result, u32 mask, V value) {
    if constexpr (std::is_same_v<R, bool>) {
        u32 bits = 0;
        for (int lane = 0; lane < LANES; ++lane) bits |= u32(bool(value(lane))) << lane;
        u32& old = *reinterpret_cast<u32*>(file + result.at);
        old = (old & ~mask) | (bits & mask);
    } else {
        R* to = reinterpret_cast<R*>(file + result.at);
        if (mask == ALL) {
            for (int lane = 0; lane < LANES; ++lane) to[lane] = value(lane);
        } else {
            for (int lane = 0; lane < LANES; ++lane)
                if (mask >> lane & 1) to[lane] = value(lane);
        }
    }
}

template <class R, class A, class F>
void map1(u8* file, const Instruction& i, u32 mask) {
    const Read<A> a(file, i.operand[1]);
    for_lanes<R>(file, i.operand[0], mask, [&](int lane) { return F{}(a[lane]); });
}
template <class R, class A, class B, class F>
void map2(u8* file, const Instruction& i, u32 mask) {
    const Read<A> a(file, i.operand[1]);
    const Read<B> b(file, i.operand[2]);
    for_lanes<R>(file, i.operand[0], mask, [&](int lane) { return F{}(a[lane], b[lane]); });
}
template <class R, class A, class B, class C, class F>
void map3(u8* file, const Instruction& i, u32 mask) {
    const Read<A> a(file, i.operand[1]);
    const Read<B> b(file, i.operand[2]);
    const Read<C> c(file, i.operand[3]);
    for_lanes<R>(file, i.operand[0], mask, [&](int lane) { return F{}(a[lane], b[lane], c[lane]); });
}
template <class R, class A, class B, class C, class D, class F>
void map4(u8* file, const Instruction& i, u32 mask) {
    const Read<A> a(file, i.operand[1]);
    const Read<B> b(file, i.operand[2]);
    const Read<C> c(file, i.operand[3]);
    const Read<D> d(file, i.operand[4]);
    for_lanes<R>(file, i.operand[0], mask, [&](int lane) { return F{}(a[lane], b[lane], c[lane], d[lane]); });
}
template <class T>
constexpr char letter() {
    return std::is_same_v<T, bool> ? 'p' : sizeof(T) == 2 ? 'h' : sizeof(T) == 4 ? 'w' : 'd';
}
template <class... T>
struct Letters {
    static constexpr char text[] = {letter<T>()..., 0};
};
template <class R, class A, class F>
static Opcode op1(const char* name, F) {
    return {name, Letters<R, A>::text, EACH_LANE, map1<R, A, F>, nullptr};
}
template <class R, class A, class B, class F>
static Opcode op2(const char* name, F) {
    return {name, Letters<R, A, B>::text, EACH_LANE, map2<R, A, B, F>, nullptr};
}
template <class R, class A, class B, class C, class F>
static Opcode op3(const char* name, F) {
    const bool select = std::is_same_v<C, bool>;
    return {name, Letters<R, A, B, C>::text, select ? SELECT : EACH_LANE, map3<R, A, B, C, F>, nullptr};
}

template <class R, class A, class B, class C, class D, class F>
static Opcode op4(const char* name, F) {
    return {name, Letters<R, A, B, C, D>::text, EACH_LANE, map4<R, A, B, C, D, F>, nullptr};
}

// --- Moves. number: bytes of an element, elements, offset. operand: the values, the address. ---

u64 address_of(Warp& warp, const Instruction& i, const Operand& operand, int lane) {
    const u32 bits = warp.machine->width[operand.id];
    return (bits == 64 ? warp.lanes<u64>(operand)[lane] : u64(warp.lanes<u32>(operand)[lane])) + u64(i.number[2]);
}
static void store_lane(Warp& warp, const Operand& operand, int lane, u64 bits) {
    const u32 bytes = warp.machine->width[operand.id] / 8;
    std::memcpy(warp.registers.data() + operand.at + lane * bytes, &bits, bytes);
}
static u64 load_lane(Warp& warp, const Operand& operand, int lane) {
    const u32 bytes = warp.machine->width[operand.id] / 8;
    u64 bits = 0;
    std::memcpy(&bits, warp.registers.data() + operand.at + lane * bytes, bytes);
    return bits;
}
template <class F>
static void lanes_of(u32 mask, F of) {
    for (; mask; mask &= mask - 1) of(std::countr_zero(mask));
}

template <bool SHARED, bool STRONG_ONE = false>
void load(Warp& warp, const Instruction& i, u32 mask) {
    const u32 bytes = u32(i.number[0]), count = u32(i.number[1]);
    warp.require_known(i.operand[count], mask, "an address");
    lanes_of(mask, [&](int lane) {
        u8 buffer[32];
        const u64 address = address_of(warp, i, i.operand[count], lane);
        if (STRONG_ONE) warp.machine->acquire(warp, address, u32(i.number[3]));
        const bool known = SHARED ? warp.machine->read_shared(warp, lane, address, bytes * count, buffer)
                                  : warp.machine->read_global(warp, lane, address, bytes * count, buffer, false, STRONG_ONE);
        for (u32 k = 0; k < count; ++k) {
            u64 bits = 0;
            std::memcpy(&bits, buffer + k * bytes, bytes);
            store_lane(warp, i.operand[k], lane, bits);
            warp.set_known(i.operand[k], 1u << lane, known ? ALL : 0);
        }
    });
}
template <bool SHARED, bool STRONG_ONE = false>
void store(Warp& warp, const Instruction& i, u32 mask) {
    const u32 bytes = u32(i.number[0]), count = u32(i.number[1]);
    warp.require_known(i.operand[count], mask, "an address");
    u32 known = ALL;
    for (u32 k = 0; k < count; ++k) {
        if (!SHARED) warp.require_known(i.operand[k], mask, "what is stored");
        known &= warp.known[i.operand[k].id];
    }
    lanes_of(mask, [&](int lane) {
        u8 buffer[32];
        for (u32 k = 0; k < count; ++k) {
            const u64 bits = load_lane(warp, i.operand[k], lane);
            std::memcpy(buffer + k * bytes, &bits, bytes);
        }
        const u64 address = address_of(warp, i, i.operand[count], lane);
        if (SHARED)
            warp.machine->write_shared(warp, lane, address, bytes * count, buffer, known >> lane & 1);
        else
            warp.machine->write_global(warp, lane, address, bytes * count, buffer, STRONG_ONE);
        if (STRONG_ONE) warp.machine->release(warp, address, u32(i.number[3]), false);
    });
}
// operands: the value and, where the address is not known beforehand, a register with a place among the parameters.
static void load_parameter(Warp& warp, const Instruction& i, u32 mask) {
    const Machine& m = *warp.machine;
    if (i.count > 1) warp.require_known(i.operand[1], mask, "an address");
    lanes_of(mask, [&](int lane) {
        u64 bits = 0;
        const u64 at = i.count > 1 ? address_of(warp, i, i.operand[1], lane) : u64(i.number[2]);
        if (at + u64(i.number[0]) > m.parameters.size() || at + u64(i.number[0]) < at)
            m.fault("bounds", "reads beyond the kernel's parameters");
        std::memcpy(&bits, m.parameters.data() + at, size_t(i.number[0]));
        store_lane(warp, i.operand[0], lane, bits);
    });
    warp.set_known(i.operand[0], mask, ALL);
}
// mov of a vector into one register, and back; the widths are the registers'.
static void pack(Warp& warp, const Instruction& i, u32 mask) {
    u32 known = ALL;
    for (u32 k = 1; k < i.count; ++k) known &= warp.known[i.operand[k].id];
    lanes_of(mask, [&](int lane) {
        u64 bits = 0;
        for (u32 k = 1, at = 0; k < i.count; at += warp.machine->width[i.operand[k].id], ++k)
            bits |= load_lane(warp, i.operand[k], lane) << at;
        store_lane(warp, i.operand[0], lane, bits);
    });
    warp.set_known(i.operand[0], mask, known);
}
static void unpack(Warp& warp, const Instruction& i, u32 mask) {
    const Operand& from = i.operand[i.count - 1];
    const u32 known = warp.known[from.id];
    lanes_of(mask, [&](int lane) {
        const u64 bits = load_lane(warp, from, lane);
        for (u32 k = 0, at = 0; k + 1 < i.count; at += warp.machine->width[i.operand[k].id], ++k)
            store_lane(warp, i.operand[k], lane, bits >> at);
    });
    for (u32 k = 0; k + 1 < i.count; ++k) warp.set_known(i.operand[k], mask, known);
}

// cp.async: operands destination, source, bytes given; number: bytes, -, offset of the source, of the destination.
// What arrives, arrives at the wait: until then the destination must not be read, nor what was there before.
static void copy_async(Warp& warp, const Instruction& i, u32 mask) {
    Machine& m = *warp.machine;
    const u32 bytes = u32(i.number[0]);
    for (int k = 0; k < 3; ++k) warp.require_known(i.operand[k], mask, "an address or size of a copy");
    lanes_of(mask, [&](int lane) {
        const u64 to = warp.lanes<u32>(i.operand[0])[lane] + u64(i.number[3]);
        const u64 from = address_of(warp, i, i.operand[1], lane);
        const u32 given = warp.lanes<u32>(i.operand[2])[lane];
        if (given > bytes) m.fault("bounds", warp, lane, "copies more bytes than it has room for");
        m.check_shared(warp, lane, to, bytes, "copies");
        if (from % bytes != 0) m.fault("misaligned", warp, lane, "copies from global address " + std::to_string(from));
        if (given > 0) {
            if (given == bytes) {
                m.region_of(warp, lane, from, bytes, "copies");
            } else {
                m.region_of(warp, lane, from, 1, "copies");
                m.region_of(warp, lane, from + given - 1, 1, "copies");
            }
        }
        m.write_shared(warp, lane, to, bytes, nullptr);
        for (u64 k = to; k < to + bytes; ++k) ++m.shadow[k].pending;
        warp.copies[lane].push_back({u32(to), bytes, given, warp.committed[lane], from});
    });
}
static void commit(Warp& warp, const Instruction&, u32 mask) {
    lanes_of(mask, [&](int lane) { ++warp.committed[lane]; });
}
static void deliver(Warp& warp, int lane, u32 before) {
    Machine& m = *warp.machine;
    auto& copies = warp.copies[lane];
    while (!copies.empty() && copies.front().group < before) {
        const Copy copy = copies.front();
        copies.pop_front();
        u8 buffer[16] = {};
        bool known = true;
        if (copy.given == copy.bytes) {
            known = m.read_global(warp, lane, copy.from, copy.bytes, buffer, true);
        } else {
            for (u32 k = 0; k < copy.given; ++k) known &= m.read_global(warp, lane, copy.from + k, 1, buffer + k, true);
        }
        for (u64 k = copy.to; k < copy.to + copy.bytes; ++k) --m.shadow[k].pending;
        m.write_shared(warp, lane, copy.to, copy.bytes, buffer, known);
    }
}
static void wait_group(Warp& warp, const Instruction& i, u32 mask) {
    lanes_of(mask, [&](int lane) {
        const u32 left = u32(i.number[0]), groups = warp.committed[lane];
        deliver(warp, lane, groups > left ? groups - left : 0);
    });
}
static void wait_all(Warp& warp, const Instruction&, u32 mask) {
    lanes_of(mask, [&](int lane) { deliver(warp, lane, ++warp.committed[lane]); });
}

// --- A warp together. ---

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };
// operands: result, value, offset, clamp, members; a second result, the predicate, stands last.
template <Shuffle HOW>
void shuffle(Warp& warp, const Instruction& i, u32 mask) {
    for (int k = 2; k <= 4; ++k) warp.require_known(i.operand[k], mask, "an operand of a shuffle");
    const u32 *value = warp.lanes<u32>(i.operand[1]), *by = warp.lanes<u32>(i.operand[2]),
              *clamps = warp.lanes<u32>(i.operand[3]);
    u32 result[LANES], known = 0, inside = 0;
    for (int lane = 0; lane < LANES; ++lane) {
        if (warp.lanes<u32>(i.operand[4])[lane] != ALL)
            warp.machine->fault("divergence", warp, lane, "shuffles with less than a warp: not supported");
        const int b = by[lane] & 31, clamp = clamps[lane] & 31, segment = clamps[lane] >> 8 & 31;
        const int highest = (lane & segment) | (clamp & ~segment), lowest = lane & segment;
        int from = HOW == UP ? lane - b : HOW == DOWN ? lane + b : HOW == BUTTERFLY ? lane ^ b : lowest | (b & ~segment);
        const bool valid = HOW == UP ? from >= highest : from <= highest;
        if (!valid) from = lane;
        result[lane] = value[from];
        known |= (warp.known[i.operand[1].id] >> from & 1) << lane;
        inside |= u32(valid) << lane;
    }
    std::memcpy(warp.lanes<u32>(i.operand[0]), result, sizeof result);
    warp.set_known(i.operand[0], mask, known);
    if (i.count > 5) {
        *warp.lanes<u32>(i.operand[5]) = inside;
        warp.set_known(i.operand[5], mask, ALL);
    }
}

template <class T, class F>
void reduce(Warp& warp, const Instruction& i, u32 mask) {
    if (*warp.lanes<u32>(i.operand[2]) != ALL) warp.machine->fault("divergence", "reduces less than a warp: not supported");
    const T* value = warp.lanes<T>(i.operand[1]);
    T total = value[0];
    for (int lane = 1; lane < LANES; ++lane) total = F{}(total, value[lane]);
    for (int lane = 0; lane < LANES; ++lane) warp.lanes<T>(i.operand[0])[lane] = total;
    warp.set_known(i.operand[0], mask, warp.known[i.operand[1].id] == ALL ? ALL : 0);
}
// operands: result, predicate, members; the predicate's bits, whether any is set, whether all are.
static u32 votes(Warp& warp, const Instruction& i) {
    if (*warp.lanes<u32>(i.operand[2]) != ALL) warp.machine->fault("divergence", "asks less than a warp: not supported");
    return *warp.lanes<u32>(i.operand[1]);
}
static void ballot(Warp& warp, const Instruction& i, u32 mask) {
    const u32 bits = votes(warp, i);
    for (int lane = 0; lane < LANES; ++lane) warp.lanes<u32>(i.operand[0])[lane] = bits;
    warp.set_known(i.operand[0], mask, warp.known[i.operand[1].id] == ALL ? ALL : 0);
}
template <bool WHOLE>
void vote(Warp& warp, const Instruction& i, u32 mask) {
    const u32 bits = votes(warp, i);
    *warp.lanes<u32>(i.operand[0]) = (WHOLE ? bits == ALL : bits != 0) ? ALL : 0;
    warp.set_known(i.operand[0], mask, warp.known[i.operand[1].id] == ALL ? ALL : 0);
}
static void warp_barrier(Warp& warp, const Instruction&, u32) { ++warp.step; }

struct Add {
    u32 operator()(u32 a, u32 b) const { return a + b; }
};
struct And {
    u32 operator()(u32 a, u32 b) const { return a & b; }
};
struct Or {
    u32 operator()(u32 a, u32 b) const { return a | b; }
};
struct Least {
    template <class T>
    T operator()(T a, T b) const { return a < b ? a : b; }
};
struct Greatest {
    template <class T>
    T operator()(T a, T b) const { return a > b ? a : b; }
};

const std::vector<Opcode>& opcodes() {
#define OP1(name, R, A, value) op1<R, A>(name, [](A a) -> R { return R(value); }),
#define OP2(name, R, A, B, value) op2<R, A, B>(name, [](A a, B b) -> R { return R(value); }),
#define OP3(name, R, A, B, C, value) op3<R, A, B, C>(name, [](A a, B b, C c) -> R { return R(value); }),
#define OP4(name, R, A, B, C, D, value) op4<R, A, B, C, D>(name, [](A a, B b, C c, D d) -> R { return R(value); }),
    static const std::vector<Opcode> table = {
        OPCODES
        {"ld.global", "", MEMORY, nullptr, load<false>},
        {"ld.shared", "", MEMORY, nullptr, load<true>},
        {"st.global", "", MEMORY, nullptr, store<false>},
        {"st.shared", "", MEMORY, nullptr, store<true>},
        {"ld.strong", "", STRONG, nullptr, load<false, true>},
        {"st.strong", "", STRONG, nullptr, store<false, true>},
        ATOMICS("32", u32, s32)
        ATOMICS("64", u64, s64)
        ATOMIC("inc.u32", u32, a >= b ? 0 : a + 1)
        ATOMIC("dec.u32", u32, a == 0 || a > b ? b : a - 1)
        ATOMIC("add.f32", f32, ftz(ftz(a) + ftz(b)))
        ATOMIC("add.f64", f64, a + b)
        {"fence", "", STRONG, nullptr, fence},
        {"fence.cta", "", MEMORY, nullptr, nothing},  // of a block: a barrier says as much
        {"nanosleep.u32", "w", STRONG, nullptr, nothing},
        {"ld.param", "", MEMORY, nullptr, load_parameter},
        {"mov.pack", "", MEMORY, nullptr, pack},
        {"mov.unpack", "", MEMORY, nullptr, unpack},
        {"cp.async", "", MEMORY, nullptr, copy_async},
        {"cp.async.commit_group", "", MEMORY, nullptr, commit},
        {"cp.async.wait_group", "", MEMORY, nullptr, wait_group},
        {"cp.async.wait_all", "", MEMORY, nullptr, wait_all},
        {"bra", "", BRANCH, nullptr, nullptr},
        {"bar.sync", "", BARRIER, nullptr, nullptr},
        {"ret", "", EXIT, nullptr, nullptr},
        {"exit", "", EXIT, nullptr, nullptr},
        {"bar.warp.sync", "", TOGETHER, nullptr, warp_barrier},
        {"vote.sync.ballot.b32", "wpw", TOGETHER, nullptr, ballot},
        {"vote.sync.any.pred", "ppw", TOGETHER, nullptr, vote<false>},
        {"vote.sync.all.pred", "ppw", TOGETHER, nullptr, vote<true>},
        {"shfl.sync.up.b32", "wwwww", TOGETHER, nullptr, shuffle<UP>},
        {"shfl.sync.down.b32", "wwwww", TOGETHER, nullptr, shuffle<DOWN>},
        {"shfl.sync.bfly.b32", "wwwww", TOGETHER, nullptr, shuffle<BUTTERFLY>},
        {"shfl.sync.idx.b32", "wwwww", TOGETHER, nullptr, shuffle<INDEX>},
        {"redux.sync.add.s32", "www", TOGETHER, nullptr, reduce<u32, Add>},
        {"redux.sync.add.u32", "www", TOGETHER, nullptr, reduce<u32, Add>},
        {"redux.sync.min.s32", "www", TOGETHER, nullptr, reduce<s32, Least>},
        {"redux.sync.max.s32", "www", TOGETHER, nullptr, reduce<s32, Greatest>},
        {"redux.sync.min.u32", "www", TOGETHER, nullptr, reduce<u32, Least>},
        {"redux.sync.max.u32", "www", TOGETHER, nullptr, reduce<u32, Greatest>},
        {"redux.sync.and.b32", "www", TOGETHER, nullptr, reduce<u32, And>},
        {"redux.sync.or.b32", "www", TOGETHER, nullptr, reduce<u32, Or>},
        {"ldmatrix", "", TOGETHER, nullptr, load_matrices},
        {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "wwwwwwwwwwwwww", TOGETHER, nullptr, multiply<bf16, 16>},
        {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "wwwwwwwwwwwwww", TOGETHER, nullptr, multiply<f16, 16>},
        {"mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32", "wwwwwwwwwww", TOGETHER, nullptr, multiply<bf16, 8>},
        {"mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32", "wwwwwwwwwww", TOGETHER, nullptr, multiply<f16, 8>},
        {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", "wwwwwwwwwwwwww", TOGETHER, nullptr, multiply<tf32, 8>},
        {"mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", "dddddd", TOGETHER, nullptr, multiply_f64},
    };
    return table;
}
