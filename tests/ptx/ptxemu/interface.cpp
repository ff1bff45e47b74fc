// What Python calls: a program is made instruction by instruction, then launched.
#include "machine.h"

extern "C" {

// Name, register letters and kind of every opcode, a line each.
const char* ptx_opcodes() {
    static const std::string text = [] {
        std::string lines;
        for (const Opcode& opcode : opcodes())
            lines += std::string(opcode.name) + "\t" + opcode.registers + "\t" + std::to_string(opcode.kind) + "\n";
        return lines;
    }();
    return text.c_str();
}

struct PlainInstruction {
    s32 opcode, guard, negated, line, count, results;
    s32 operand[16];
    s64 number[4];
};
struct PlainRegion {
    u64 base, size, known;
};
struct PlainView {
    u64 region, base, item, dimensions;
    u64 sizes[8], strides[8];
};

Machine* ptx_program(const PlainInstruction* code, u32 size, const u32* widths, u32 registers, const u32* constant_ids,
                     const u64* constants, u32 constant_count, const s32* special, u32 threads) {
    auto* m = new Machine;
    m->width.assign(widths, widths + registers);
    for (u32 bits : m->width) {
        m->place.push_back(m->file_size);
        m->file_size += bits == 1 ? 64 : LANES * bits / 8;
    }
    for (u32 i = 0; i < constant_count; ++i) m->constants.push_back({constant_ids[i], constants[i]});
    std::copy(special, special + 12, m->special);
    m->lane_register = special[12], m->warp_register = special[13];
    m->threads = threads;
    for (u32 n = 0; n < size; ++n) {
        const PlainInstruction& given = code[n];
        const Opcode& opcode = opcodes()[given.opcode];
        Instruction i;
        i.each = opcode.each, i.whole = opcode.whole, i.kind = opcode.kind;
        i.negated = given.negated, i.guard = given.guard, i.line = u32(given.line);
        if (i.guard >= 0) i.guard_at = m->place[i.guard];
        i.count = u8(given.count), i.results = u8(given.results);
        std::copy(given.number, given.number + 4, i.number);
        for (int k = 0; k < given.count; ++k) i.operand[k] = {m->place[given.operand[k]], u32(given.operand[k])};
        m->code.push_back(i);
    }
    return m;
}
void ptx_free(Machine* m) { delete m; }

// Null, or "kind\nwhat" of the fault that stopped the launch.
const char* ptx_launch(Machine* m, const u32* grid, const u8* parameters, u32 parameter_bytes, const PlainRegion* regions,
                       u32 region_count, const PlainView* views, u32 view_count, u32 shared, u64 order, u64 limit, f64 scale, u64 seed, s32 strict,
                       u32 resident, u64* hits) {
    static thread_local std::string message;
    std::copy(grid, grid + 3, m->grid);
    m->parameters.assign(parameters, parameters + parameter_bytes);
    m->regions.clear();
    for (u32 k = 0; k < region_count; ++k) {
        const auto& [base, size, known] = regions[k];
        m->regions.push_back({base, size, k, reinterpret_cast<u8*>(known), {}, {}});
        m->regions.back().pages.resize(size / Page::SIZE + 1);
    }
    for (u32 k = 0; k < view_count; ++k) {
        const PlainView& given = views[k];
        View view{given.base, given.item, {}, false};
        u64 elements = 1;
        for (u64 d = 0; d < given.dimensions; ++d) {
            elements *= given.sizes[d];
            if (given.sizes[d] > 1 && given.strides[d] > 0) view.dimensions.push_back({given.sizes[d], given.strides[d]});
        }
        std::sort(view.dimensions.begin(), view.dimensions.end(), [](auto a, auto b) { return a.second > b.second; });
        view.dense = view.span() == elements * view.item;
        m->regions[given.region].views.push_back(view);
    }
    m->shared_size = shared, m->order = order, m->limit = limit, m->strict_warps = strict, m->resident = resident;
    approximation = {scale, seed};
    const char* answer = nullptr;
    try {
        m->launch();
    } catch (const Fault& fault) {
        message = fault.kind + "\n" + fault.what;
        answer = message.c_str();
    } catch (const std::exception& error) {
        message = std::string("limit\n") + error.what();
        answer = message.c_str();
    }
    m->regions.clear();
    std::copy(m->hits.begin(), m->hits.end(), hits);
    return answer;
}
}
