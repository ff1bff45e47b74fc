// Shared and global memory: bounds, alignment, bytes that hold no value, races.
#include "machine.h"

static std::string thread_of(u32 global, u32 threads) {
    return "thread " + std::to_string(global % threads) + " of block " + std::to_string(global / threads);
}

u64 View::span() const {
    u64 size = item;
    for (auto [count, stride] : dimensions) size += (count - 1) * stride;
    return size;
}

// Whether `rest` is a sum of indices times strides, and less than an element.
static bool reached(const View& view, size_t dimension, u64 rest) {
    if (dimension == view.dimensions.size()) return rest < view.item;
    u64 beyond = view.item - 1;
    for (size_t d = dimension + 1; d < view.dimensions.size(); ++d)
        beyond += (view.dimensions[d].first - 1) * view.dimensions[d].second;
    const auto [count, stride] = view.dimensions[dimension];
    for (u64 index = std::min(rest / stride, count - 1);; --index) {
        if (rest - index * stride > beyond) return false;
        if (reached(view, dimension + 1, rest - index * stride)) return true;
        if (index == 0) return false;
    }
}
bool View::holds(u64 address) const {
    return address >= base && address < base + span() && (dense || reached(*this, 0, address - base));
}

Region& Machine::region_of(const Warp& warp, int lane, u64 address, u32 bytes, const char* doing) {
    if (address % bytes != 0)
        fault("misaligned", warp, lane, std::string(doing) + " " + std::to_string(bytes) + " bytes at global address " +
                                            std::to_string(address));
    for (Region& region : regions) {
        if (address < region.base || address + bytes > region.base + region.size) continue;
        for (u64 at = address; !region.dense() && at < address + bytes;) {
            const View* found = nullptr;
            for (const View& view : region.views)
                if (view.holds(at)) found = &view;
            if (!found)
                fault("bounds", warp, lane, std::string(doing) + " between the elements of array " +
                                                std::to_string(region.index) + ", byte " +
                                                std::to_string(at - region.base));
            at += std::max<u64>(1, std::min<u64>(found->item, bytes));
        }
        return region;
    }
    std::string nearest;
    u64 least = ~0ull;
    for (const Region& region : regions) {
        const u64 below = region.base - address, beyond = address + bytes - (region.base + region.size);
        const u64 gap = address < region.base ? below : beyond;
        if (gap < least) {
            least = gap;
            nearest = ", " + std::to_string(gap) + " bytes " + (address < region.base ? "before" : "beyond") +
                      " array " + std::to_string(region.index);
        }
    }
    fault("bounds", warp, lane, std::string(doing) + " " + std::to_string(bytes) + " bytes outside of all arrays" + nearest);
}

// --- Where blocks meet: an access is in order with another if a chain of barriers, fences and atomic operations, or loads
// and stores with an order, leads from one to the other. A warp is one thread of that chain, not each lane. ---

u32 Warp::number() const { return machine->block * (machine->threads / LANES) + index; }

static void join(Clock& into, const Clock& other) {
    if (into.size() < other.size()) into.resize(other.size());
    for (size_t k = 0; k < other.size(); ++k) into[k] = std::max(into[k], other[k]);
}
void Warp::learn(const Clock& other) {
    join(clock, other);
    ++clock[number()];  // a time of a warp belongs to one clock
}
void Warp::fence() {
    join(clock, seen);
    seen.clear();
    fenced = clock;
    ++clock[number()];
}
void Machine::acquire(Warp& warp, u64 address, u32 order) {
    const auto found = released.find(address);
    if (found == released.end()) return;
    if (order & ACQUIRE) warp.learn(found->second.clock);
    else join(warp.seen, found->second.clock);
}
// `keep`: what was read and written in one goes on where the last one left off, and so does who wrote last.
void Machine::release(Warp& warp, u64 address, u32 order, bool keep) {
    auto& [clock, by] = released[address];
    if (!keep && by != warp.number()) clock.clear();
    by = warp.number();
    join(clock, order & RELEASE ? warp.clock : warp.fenced);
    ++warp.clock[warp.number()];
}

u32 Readers::with(u32 set, u32 warp, const Clock& clock) {
    const u64 key = u64(set) << 32 | warp;
    for (auto [time, found] : next[key])
        if (time == clock[warp]) return found;
    Set made;
    for (auto [other, time] : sets[set])
        if (time > clock[other]) made.push_back({other, time});
    made.push_back({warp, clock[warp]});
    u32 found = u32(sets.size());
    if (sets[set] == made) found = set;
    else sets.push_back(made);
    next[key].push_back({clock[warp], found});
    return found;
}
bool Machine::before(const Warp& warp, u32 writer, u32 time) const { return time <= warp.clock[writer]; }

void Machine::check_order(Warp& warp, int lane, Region& region, u64 at, bool writes, bool strong) {
    Page& page = region.page(at);
    const u64 k = at % Page::SIZE;
    const auto place = [&] { return std::to_string(at) + " of array " + std::to_string(region.index); };
    const u32 writer = page.writer[k];
    if (writer != 0 && !(strong && page.strong[k]) && !before(warp, (writer - 1) / LANES, page.interval[k]))
        fault("race", warp, lane, std::string(writes ? "writes" : "reads") + " byte " + place() + ", which " +
                                      thread_of(writer - 1, threads) + " wrote, with nothing that orders the two");
    if (!writes) return;
    for (auto [other, time] : readers.sets[page.reader[k]])
        if (!before(warp, other, time))
            fault("race", warp, lane, "writes byte " + place() + ", which " + thread_of(other * LANES, threads) +
                                          " or another of its warp read, with nothing that orders the two");
}

bool Machine::read_global(Warp& warp, int lane, u64 address, u32 bytes, void* to, bool copying, bool strong) {
    Region& region = region_of(warp, lane, address, bytes, copying ? "copies" : "reads");
    const u64 at = address - region.base;
    const u32 self = block * threads + warp.thread(lane) + 1;
    for (u64 i = at; i < at + bytes; ++i) {
        Page& page = region.page(i);
        const u64 k = i % Page::SIZE;
        if (meeting) {
            check_order(warp, lane, region, i, false, strong);
            if (!strong) page.reader[k] = readers.with(page.reader[k], warp.number(), warp.clock);
            continue;
        }
        const u32 writer = page.writer[k];
        if (writer != 0 && writer != self) {
            const bool other_block = (writer - 1) / threads != block;
            if (other_block || (page.interval[k] == interval && (writer - 1) % threads / LANES != warp.index))
                fault("race", warp, lane, "reads byte " + std::to_string(i) + " of array " + std::to_string(region.index) +
                                              ", which " + thread_of(writer - 1, threads) + " wrote in the same launch" +
                                              (other_block ? "" : " with no barrier between"));
        }
        u32& reader = page.reader[k];
        reader = reader == 0 || reader == block + 1 ? block + 1 : ALL;
    }
    std::memcpy(to, reinterpret_cast<const void*>(address), bytes);
    return !region.known || std::all_of(region.known + at, region.known + at + bytes, [](u8 known) { return known; });
}

void Machine::write_global(Warp& warp, int lane, u64 address, u32 bytes, const void* from, bool strong) {
    Region& region = region_of(warp, lane, address, bytes, "writes");
    const u64 at = address - region.base;
    const u32 self = block * threads + warp.thread(lane) + 1;
    u8* memory = reinterpret_cast<u8*>(region.base);
    for (u32 k = 0; k < bytes; ++k) {
        const u64 i = at + k;
        const u8 value = static_cast<const u8*>(from)[k];
        Page& page = region.page(i);
        u32 &writer = page.writer[i % Page::SIZE], &since = page.interval[i % Page::SIZE];
        u32& reader = page.reader[i % Page::SIZE];
        const bool same = memory[i] == value;
        if (meeting) {
            if (!same || strong) check_order(warp, lane, region, i, true, strong);
            if (!same) ++progress;
            reader = 0;
            page.strong[i % Page::SIZE] = strong;
            since = warp.clock[warp.number()];
        } else {
            if (!same && writer != 0 && writer != self &&
                ((writer - 1) / threads != block || since == interval))
                fault("race", warp, lane, "writes byte " + std::to_string(i) + " of array " + std::to_string(region.index) +
                                              ", where " + thread_of(writer - 1, threads) +
                                              " wrote something else in the same launch");
            if (!same && reader != 0 && reader != block + 1)
                fault("race", warp, lane, "writes byte " + std::to_string(i) + " of array " + std::to_string(region.index) +
                                              ", which another block read in the same launch");
            since = interval;
        }
        writer = self;
        if (region.known) region.known[i] = 1;
        memory[i] = value;
    }
}

void Machine::check_shared(const Warp& warp, int lane, u64 address, u32 bytes, const char* doing) const {
    if (address % bytes != 0)
        fault("misaligned", warp, lane,
              std::string(doing) + " " + std::to_string(bytes) + " bytes at shared address " + std::to_string(address));
    if (address + bytes > shared_size || address + bytes < address)
        fault("bounds", warp, lane, std::string(doing) + " " + std::to_string(bytes) + " bytes at shared address " +
                                        std::to_string(s64(address)) + " of " + std::to_string(shared_size));
}

bool Machine::read_shared(Warp& warp, int lane, u64 address, u32 bytes, void* to) {
    bool known = true;
    check_shared(warp, lane, address, bytes, "reads");
    const u16 self = u16(warp.thread(lane));
    for (u64 i = address; i < address + bytes; ++i) {
        SharedByte& byte = shadow[i];
        if (byte.pending)
            fault("pending", warp, lane,
                  "reads shared byte " + std::to_string(i) + ", into which an asynchronous copy was not waited for");
        if (byte.write_interval == interval && byte.writer != self) {
            const bool other = byte.writer / LANES != warp.index;
            if (other || (strict_warps && byte.write_step == warp.step))
                fault("race", warp, lane, "reads shared byte " + std::to_string(i) + ", which thread " +
                                              std::to_string(byte.writer) + " wrote with no barrier between");
        }
        known &= byte.content == VALUE;
        if (byte.content == NOTHING)
            fault("uninitialised", warp, lane, "reads shared byte " + std::to_string(i) + ", which holds no value");
        if (byte.read_interval != interval) {
            byte.read_interval = interval;
            byte.several_warps = byte.several_lanes = false;
            byte.reader = self;
        } else if (byte.reader != self) {
            byte.several_warps |= byte.reader / LANES != warp.index;
            byte.several_lanes = true;
            byte.reader = self;
        }
        byte.read_step = warp.step;
    }
    std::memcpy(to, shared.data() + address, bytes);
    return known;
}

void Machine::write_shared(Warp& warp, int lane, u64 address, u32 bytes, const void* from, bool known) {
    check_shared(warp, lane, address, bytes, "writes");
    const u16 self = u16(warp.thread(lane));
    for (u32 k = 0; k < bytes; ++k) {
        const u64 i = address + k;
        SharedByte& byte = shadow[i];
        const bool same = from && byte.content == VALUE && shared[i] == static_cast<const u8*>(from)[k];
        if (!same && byte.write_interval == interval && byte.writer != self) {
            const bool other = byte.writer / LANES != warp.index;
            if (other || (strict_warps && byte.write_step == warp.step))
                fault("race", warp, lane, "writes shared byte " + std::to_string(i) + ", where thread " +
                                              std::to_string(byte.writer) + " wrote something else with no barrier between");
        }
        if (!same && byte.read_interval == interval) {
            const bool other = byte.several_warps || byte.reader / LANES != warp.index;
            const bool sibling = byte.several_lanes || byte.reader != self;
            if (other || (strict_warps && sibling && byte.read_step == warp.step))
                fault("race", warp, lane, "writes shared byte " + std::to_string(i) + ", which thread " +
                                              std::to_string(byte.reader) + " read with no barrier between");
        }
        byte.write_interval = interval;
        byte.write_step = warp.step;
        byte.writer = self;
        if (from) {
            byte.content = known ? VALUE : UNDEFINED;
            shared[i] = static_cast<const u8*>(from)[k];
        }
    }
}
