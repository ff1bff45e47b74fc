// A launch: blocks of warps over shared and global memory, and what is wrong with them.
#pragma once
#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "values.h"

constexpr int LANES = 32;
constexpr u32 ALL = ~0u;

// What a kernel did that it must not do; `kind` is a word, see README.md.
struct Fault {
    std::string kind, what;
};

enum Kind : u8 { EACH_LANE, SELECT, MEMORY, TOGETHER, BRANCH, BARRIER, EXIT, STRONG };  // STRONG: others may see it, or wait

struct Operand {
    u32 at, id;  // byte offset into a warp's registers; number of the register
};
struct Instruction;
struct Warp;
using EachLane = void (*)(u8* registers, const Instruction&, u32 mask);
using WholeWarp = void (*)(Warp&, const Instruction&, u32 mask);
struct Instruction {
    EachLane each = nullptr;
    WholeWarp whole = nullptr;
    Kind kind = EACH_LANE;
    bool negated = false;
    u8 count = 0, results = 0;
    s32 guard = -1;
    u32 guard_at = 0, line = 0;
    s64 number[4] = {};
    Operand operand[16] = {};
};

enum Content : u8 { NOTHING, VALUE, UNDEFINED };
// What is known of a byte of shared memory: who wrote and who read it since the last barrier.
struct SharedByte {
    u32 write_interval = 0, read_interval = 0;  // number of the interval between two barriers
    u32 write_step = 0, read_step = 0;          // of the warp: intervals between two of its own barriers
    u16 writer = 0, reader = 0;
    u8 content = 0;  // NOTHING, VALUE, or UNDEFINED: what was stored there held no value
    bool several_lanes = false, several_warps = false;
    u8 pending = 0;  // copies that were started and not waited for
};

// One array: where its elements are.
struct View {
    u64 base, item;
    std::vector<std::pair<u64, u64>> dimensions;  // (size, stride) with sizes above 1, largest stride first
    bool dense;                                   // no gaps between the elements
    u64 span() const;
    bool holds(u64 address) const;  // an element that starts there, or its parts
};
// A stretch of global memory that arrays share: which of its bytes hold a value, who wrote and read them. Pages of the
// shadow are made when they are touched: a stretch may be larger than memory.
struct Page {
    static constexpr u64 SIZE = 1024;
    u32 writer[SIZE] = {}, interval[SIZE] = {}, reader[SIZE] = {};  // thread of the grid + 1; block + 1 (ALL: several)
    // Where blocks meet, `interval` is the writer's own time, and `reader` a number of Readers.
    bool strong[SIZE] = {};  // written by an atomic operation, or a store with an order
};
struct Region {
    u64 base, size;
    u32 index;
    u8* known;  // null: all
    std::vector<View> views;
    std::vector<std::unique_ptr<Page>> pages;
    bool dense() const { return views.size() == 1 && views[0].dense; }
    Page& page(u64 at) {
        auto& page = pages[at / Page::SIZE];
        if (!page) page = std::make_unique<Page>();
        return *page;
    }
};

struct Copy {
    u32 to, bytes, given, group;
    u64 from;
};

struct Group {
    u32 at, mask;
    bool waiting;
};

// For each warp of the grid how much of it has happened, as far as one of them can know: its number of intervals.
using Clock = std::vector<u32>;
// What orders accesses of several blocks: the bits of an instruction's number[3].
enum Order : u8 { RELAXED = 0, ACQUIRE = 1, RELEASE = 2 };

// What happened before what stands in a place was written, and the warp that wrote it.
struct Released {
    Clock clock;
    u32 by = ALL;
};
// Sets of (warp, its time) that read a byte, each of them once: accesses are alike, so there are few.
struct Readers {
    using Set = std::vector<std::pair<u32, u32>>;
    std::vector<Set> sets = {{}};
    std::unordered_map<u64, std::vector<std::pair<u64, u32>>> next;  // by set and warp: (time, set with it)
    u32 with(u32 set, u32 warp, const Clock& clock);
};

struct Machine;
struct Warp {
    Machine* machine = nullptr;
    u32 index = 0, step = 1;
    std::vector<u8> registers;
    std::vector<u32> known;  // lanes that hold a value, by register
    std::vector<Group> groups;
    std::vector<std::deque<Copy>> copies;  // of each lane, not delivered
    std::vector<u32> committed;
    u32 live = ALL;
    s32 barrier = -1;      // that it waits at
    bool yielded = false;  // after an instruction at which others may go on
    // Where blocks meet: what happened before now; before its last fence; before what it read and may rely on after one.
    Clock clock, fenced, seen;

    template <class T>
    T* lanes(const Operand& operand) {
        return reinterpret_cast<T*>(registers.data() + operand.at);
    }
    u32 thread(int lane) const { return index * LANES + lane; }
    void require_known(const Operand& operand, u32 mask, const char* as) const;
    void set_known(const Operand& operand, u32 mask, u32 which) {
        u32& bits = known[operand.id];
        bits = (bits & ~mask) | (which & mask);
    }
    void run();  // up to the next barrier of the block, or an instruction at which others may go on, or the end
    void fence();
    void learn(const Clock& other);
    u32 number() const;  // in the grid

   private:
    void merge();
    void execute(Group& group, u32 stop);
};

// A block that is not the one that runs.
struct Block {
    u32 index = 0, interval = 0;
    std::vector<u8> shared;
    std::vector<SharedByte> shadow;
    std::vector<Warp> warps;
};

struct Machine {
    // The program.
    std::vector<Instruction> code;
    std::vector<u32> width, place;  // of registers: bits; offset
    std::vector<std::pair<u32, u64>> constants;
    u32 file_size = 0;
    s32 special[12];  // registers of %tid.x, .y, .z, %ntid.x ..., %ctaid.x ..., %nctaid.x ...; or -1
    s32 lane_register = -1, warp_register = -1;
    u32 threads = 0, grid[3] = {1, 1, 1};
    // The launch.
    std::vector<u8> parameters;
    std::vector<Region> regions;
    u32 shared_size = 0;
    u64 order = 0;  // of warps and blocks: 0 ascending, 1 descending, else drawn
    u64 steps = 0, limit = 0;
    bool strict_warps = false;
    u32 resident = 0;  // blocks that run at once, 0: all
    // State.
    bool meeting = false;  // the program has instructions by which blocks may wait for each other
    u64 progress = 0;      // grows with whatever others could wait for
    Readers readers;
    std::unordered_map<u64, Released> released;  // by address
    u32 block = 0, interval = 0, line = 0;
    std::vector<u8> shared;
    std::vector<SharedByte> shadow;
    std::vector<Warp> warps;
    std::vector<u64> hits;  // lanes, by instruction
    u64 random = 0;

    void launch();
    void start(u32 index);
    bool turn();  // of the block: whether it is done
    void meet(const std::vector<u32>& blocks);
    void exchange(Block& other);
    [[noreturn]] void report_standstill(std::vector<std::unique_ptr<Block>>& blocks);
    bool before(const Warp& warp, u32 writer, u32 time) const;
    void check_order(Warp& warp, int lane, Region& region, u64 at, bool writes, bool strong);
    std::vector<u32> ordered(u32 count);
    [[noreturn]] void fault(const char* kind, std::string what) const;
    [[noreturn]] void fault(const char* kind, const Warp& warp, int lane, const std::string& what) const;

    Region& region_of(const Warp& warp, int lane, u64 address, u32 bytes, const char* doing);
    // Reads answer whether all that was read held a value.
    bool read_global(Warp& warp, int lane, u64 address, u32 bytes, void* to, bool copying, bool strong = false);
    void write_global(Warp& warp, int lane, u64 address, u32 bytes, const void* from, bool strong = false);
    void acquire(Warp& warp, u64 address, u32 order);
    void release(Warp& warp, u64 address, u32 order, bool keep);
    bool read_shared(Warp& warp, int lane, u64 address, u32 bytes, void* to);
    void write_shared(Warp& warp, int lane, u64 address, u32 bytes, const void* from, bool known = true);
    void check_shared(const Warp& warp, int lane, u64 address, u32 bytes, const char* doing) const;
};

struct Opcode {
    const char* name;
    const char* registers;  // of result and operands: p predicate, h 16, w 32, d 64 bits; empty: it varies
    Kind kind;
    EachLane each;
    WholeWarp whole;
};
const std::vector<Opcode>& opcodes();
