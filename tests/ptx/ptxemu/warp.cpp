// Lanes with program counters of their own, which wait for each other where an instruction needs them together.
#include <sstream>

#include "machine.h"

void Machine::fault(const char* kind, std::string what) const {
    throw Fault{kind, "line " + std::to_string(line) + ": block " + std::to_string(block) + ": " + what};
}

void Machine::fault(const char* kind, const Warp& warp, int lane, const std::string& what) const {
    throw Fault{kind, "line " + std::to_string(line) + ": thread " + std::to_string(warp.thread(lane)) + " of block " +
                          std::to_string(block) + " " + what};
}

void Warp::require_known(const Operand& operand, u32 mask, const char* as) const {
    const u32 missing = mask & ~known[operand.id];
    if (missing)
        machine->fault("uninitialised", *this, std::countr_zero(missing),
                       std::string("uses a register that holds no value as ") + as);
}

// Groups at one instruction become one; those that wait stay where they are.
void Warp::merge() {
    std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.at < b.at; });
    size_t kept = 0;
    for (size_t i = 0; i < groups.size(); ++i) {
        if (groups[i].mask == 0) continue;
        if (kept > 0 && groups[kept - 1].at == groups[i].at) {
            groups[kept - 1].mask |= groups[i].mask;
            groups[kept - 1].waiting = false;  // look again whether all are there
        } else {
            groups[kept++] = groups[i];
        }
    }
    groups.resize(kept);
}

void Warp::run() {
    barrier = -1;
    yielded = false;
    while (true) {
        merge();
        if (groups.empty()) return;
        auto next = std::find_if(groups.begin(), groups.end(), [](const Group& group) { return !group.waiting; });
        if (next == groups.end()) {
            std::ostringstream where;
            where << "deadlock in warp " << index << ": ";
            for (const Group& group : groups)
                where << "lanes " << std::hex << group.mask << std::dec << " wait at line " << machine->code[group.at].line
                      << "; ";
            if (live != ALL) where << "lanes " << std::hex << ~live << " have left";
            machine->fault("deadlock", where.str());
        }
        u32 stop = ALL;
        for (const Group& group : groups)
            if (&group != &*next && group.at > next->at) stop = std::min(stop, group.at);
        const size_t place = next - groups.begin();
        execute(groups[place], stop);
        if (barrier >= 0 || yielded) return;
    }
}

// Until the group splits, waits, leaves, or comes to where others are (`stop`, or anywhere behind a jump).
void Warp::execute(Group& group, u32 stop) {
    Machine& m = *machine;
    const bool alone = groups.size() == 1;
    u8* file = registers.data();
    u32 at = group.at;
    const u32 all = group.mask;
    while (at < stop) {
        const Instruction& i = m.code[at];
        m.line = i.line;
        if (++m.steps > m.limit) m.fault("limit", "more than " + std::to_string(m.limit) + " instructions");
        u32 mask = all;
        if (i.guard >= 0) {
            const u32 bits = *reinterpret_cast<u32*>(file + i.guard_at);
            require_known({i.guard_at, u32(i.guard)}, all, "a guard");
            mask &= i.negated ? ~bits : bits;
        }
        m.hits[at] += std::popcount(mask);
        switch (i.kind) {
            case EACH_LANE: {
                if (mask == 0) break;
                i.each(file, i, mask);
                u32 which = ALL;
                for (u32 k = 1; k < i.count; ++k) which &= known[i.operand[k].id];
                set_known(i.operand[0], mask, which);
                break;
            }
            case SELECT: {
                if (mask == 0) break;
                i.each(file, i, mask);
                const u32 chosen = *reinterpret_cast<u32*>(file + i.operand[3].at);
                const u32 which = (chosen & known[i.operand[1].id]) | (~chosen & known[i.operand[2].id]);
                set_known(i.operand[0], mask, which & known[i.operand[3].id]);
                break;
            }
            case MEMORY:
                if (mask != 0) i.whole(*this, i, mask);
                break;
            case STRONG:
                if (mask == 0) break;
                i.whole(*this, i, mask);
                group.at = at + 1;
                yielded = true;
                return;
            case TOGETHER:
                if (mask == 0) break;
                if (mask != ALL) {
                    if (mask != all) m.fault("divergence", "lanes of a warp skip an instruction for all");
                    group.at = at;
                    group.waiting = true;
                    return;
                }
                i.whole(*this, i, mask);
                break;
            case BARRIER:
                if (mask == 0) break;
                if (mask != ALL) {
                    if (mask != all) m.fault("divergence", "lanes of a warp skip a barrier");
                    group.at = at;
                    group.waiting = true;
                    return;
                }
                barrier = s32(i.number[0]);
                group.at = at + 1;
                ++step;
                return;
            case BRANCH: {
                const u32 target = u32(i.number[0]);
                if (mask == all) {
                    at = target;
                    if (alone) continue;
                    group.at = at;
                    return;
                }
                if (mask == 0) break;
                group.at = at + 1;
                group.mask = all & ~mask;
                groups.push_back({target, mask, false});
                return;
            }
            case EXIT:
                live &= ~mask;
                ++m.progress;
                group.mask = all & ~mask;
                group.at = at + 1;
                return;
        }
        ++at;
    }
    group.at = at;
}

std::vector<u32> Machine::ordered(u32 count) {
    std::vector<u32> result(count);
    for (u32 i = 0; i < count; ++i) result[i] = order == 1 ? count - 1 - i : i;
    if (order > 1)
        for (u32 i = count; i > 1; --i) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            std::swap(result[i - 1], result[(random >> 33) % i]);
        }
    return result;
}

void Machine::start(u32 index) {
    block = index;
    const u32 count = threads / LANES;
    shadow.assign(shared_size, SharedByte{});
    shared.assign(shared_size, u8(0xcd));
    warps.resize(count);
    ++interval;
    const u32 x = block % grid[0], y = block / grid[0] % grid[1], z = block / grid[0] / grid[1];
    const u32 fixed[9] = {threads, 1, 1, x, y, z, grid[0], grid[1], grid[2]};
    for (u32 w = 0; w < count; ++w) {
        Warp& warp = warps[w];
        warp.machine = this;
        warp.index = w;
        warp.registers.resize(file_size);
        warp.known.assign(width.size(), 0);
        warp.groups = {{0, ALL, false}};
        warp.copies.assign(LANES, {});
        warp.committed.assign(LANES, 0);
        warp.live = ALL;
        warp.step = 1;
        warp.barrier = -1;
        if (meeting) {
            warp.clock.assign(size_t(grid[0]) * grid[1] * grid[2] * count, 0);
            warp.clock[warp.number()] = 1;
            warp.fenced.clear(), warp.seen.clear();
        }
        auto fill = [&](s32 id, auto value) {
            if (id < 0) return;
            warp.known[id] = ALL;
            for (int lane = 0; lane < LANES; ++lane) {
                const u64 bits = value(lane);
                if (width[id] == 1) {
                    u32& mask = *reinterpret_cast<u32*>(warp.registers.data() + place[id]);
                    mask = (mask & ~(1u << lane)) | (u32(bits & 1) << lane);
                } else {
                    std::memcpy(warp.registers.data() + place[id] + lane * (width[id] / 8), &bits, width[id] / 8);
                }
            }
        };
        for (auto [id, bits] : constants) fill(s32(id), [bits = bits](int) { return bits; });
        fill(special[0], [&](int lane) { return u64(w * LANES + lane); });
        fill(special[1], [](int) { return 0ull; });
        fill(special[2], [](int) { return 0ull; });
        for (int k = 0; k < 9; ++k) fill(special[3 + k], [&](int) { return u64(fixed[k]); });
        fill(lane_register, [](int lane) { return u64(lane); });
        fill(warp_register, [&](int) { return u64(w); });
    }
}

// Every warp that does not wait goes on to where it stops; if all of them wait, they go on together.
bool Machine::turn() {
    bool waits = false, left = false;
    s32 barrier = -1;
    for (u32 w : ordered(u32(warps.size())))
        if (!warps[w].groups.empty() && warps[w].barrier < 0) warps[w].run();
    for (const Warp& warp : warps) {
        if (warp.groups.empty()) {
            left = true;
        } else if (warp.barrier < 0) {
            return false;
        } else {
            if (waits && warp.barrier != barrier) fault("deadlock", "warps wait at two different barriers");
            waits = true;
            barrier = warp.barrier;
        }
    }
    if (!waits) return true;
    if (left) fault("deadlock", "warps wait at a barrier that others, which have left, never come to");
    ++interval, ++progress;
    Clock all;
    for (Warp& warp : warps) {
        warp.barrier = -1;
        if (!meeting) continue;
        all.resize(warp.clock.size());
        for (size_t k = 0; k < all.size(); ++k) all[k] = std::max(all[k], warp.clock[k]);
    }
    if (meeting)
        for (Warp& warp : warps) warp.learn(all);
    return false;
}

void Machine::exchange(Block& other) {
    std::swap(block, other.index);
    std::swap(interval, other.interval);
    shared.swap(other.shared);
    shadow.swap(other.shadow);
    warps.swap(other.warps);
}

void Machine::report_standstill(std::vector<std::unique_ptr<Block>>& blocks) {
    std::ostringstream where;
    where << "no block goes on: ";
    for (auto& waiting : blocks) {
        where << "block " << waiting->index << ": ";
        for (const Warp& warp : waiting->warps)
            for (const Group& group : warp.groups)
                where << "warp " << warp.index << (warp.barrier >= 0 ? " waits above" : " is at") << " line "
                      << code[std::min<size_t>(group.at, code.size() - 1)].line << "; ";
    }
    throw Fault{"deadlock", where.str()};
}

// Blocks in turn, as they may be waiting for each other. One is left where its turn changed nothing; where an order was
// drawn, after every turn.
void Machine::meet(const std::vector<u32>& indices) {
    constexpr u64 PATIENCE = 500;  // turns of each block in which nothing changes
    std::vector<std::unique_ptr<Block>> running;
    size_t next = 0, at = 0;
    u64 idle = 0;
    while (next < indices.size() || !running.empty()) {
        const bool room = next < indices.size() && (resident == 0 || running.size() < resident);
        if (running.empty() || (room && (order > 1 ? ordered(2)[0] == 0 : idle > 0 && at == running.size()))) {
            running.push_back(std::make_unique<Block>());
            exchange(*running.back());
            start(indices[next++]);
            exchange(*running.back());
            at = running.size() - 1;
            idle = 0;
        } else if (order > 1) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            at = (random >> 33) % running.size();
        }
        at %= running.size();
        const u64 so_far = progress;
        exchange(*running[at]);
        const bool done = turn();
        exchange(*running[at]);
        if (done) running.erase(running.begin() + at);
        if (progress != so_far) {
            idle = 0;
            continue;
        }
        ++at;
        if (++idle > PATIENCE * running.size() && !(room && order > 1)) report_standstill(running);
    }
}

void Machine::launch() {
    hits.assign(code.size(), 0);
    steps = 0;
    interval = 0;
    random = order;
    progress = 0;
    readers = {};
    released.clear();
    meeting = std::any_of(code.begin(), code.end(), [](const Instruction& i) { return i.kind == STRONG; });
    const std::vector<u32> blocks = ordered(grid[0] * grid[1] * grid[2]);
    if (meeting) return meet(blocks);
    for (u32 b : blocks) {
        start(b);
        while (!turn()) {}
    }
}
