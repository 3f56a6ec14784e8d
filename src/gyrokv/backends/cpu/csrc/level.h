// What an instruction set needs of the CPU and of the operating system, by the name of its kernels.
#pragma once
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace gyrokv {

#if defined(__x86_64__)

struct Bit {
    const char* name;
    uint32_t leaf, subleaf;
    int reg;  // 0 to 3: eax, ebx, ecx, edx
    int bit;
};

constexpr Bit kAvx2[] = {{"fma", 1, 0, 2, 12}, {"avx", 1, 0, 2, 28}, {"f16c", 1, 0, 2, 29}, {"avx2", 7, 0, 1, 5}};
constexpr Bit kAvxVnni[] = {{"avx_vnni", 7, 1, 0, 4}};
constexpr Bit kAvx512[] = {
    {"avx512f", 7, 0, 1, 16},    {"avx512dq", 7, 0, 1, 17},    {"avx512bw", 7, 0, 1, 30},   {"avx512vl", 7, 0, 1, 31},
    {"avx512vbmi", 7, 0, 2, 1},  {"avx512_vnni", 7, 0, 2, 11}, {"avx512_bf16", 7, 1, 0, 5},
};
constexpr Bit kAmx[] = {{"amx_bf16", 7, 0, 3, 22}, {"amx_tile", 7, 0, 3, 24}, {"amx_int8", 7, 0, 3, 25}};

template <size_t N>
void need(const Bit (&bits)[N], std::string& lacks) {
    for (const Bit& b : bits) {
        uint32_t regs[4] = {};
        __get_cpuid_count(b.leaf, b.subleaf, &regs[0], &regs[1], &regs[2], &regs[3]);
        if (!(regs[b.reg] >> b.bit & 1)) lacks += (lacks.empty() ? "this CPU has no " : ", no ") + std::string(b.name);
    }
}

// Register states that the operating system saves: XCR0.
inline uint64_t saved_states() {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return uint64_t(d) << 32 | a;
}

// Linux lends tiles to a process that asks for them.
inline std::string ask_for_tiles() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
    if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0)
        return std::string("the operating system refused AMX tiles: ") + std::strerror(errno);
    return "";
#else
    return "AMX tiles are asked for on Linux only";
#endif
}

inline std::string lacks_of(const std::string& level) {
    if (level == "portable") return "";
    const bool amx = level == "amx", avx512 = amx || level == "avx512";
    std::string lacks;
    need(kAvx2, lacks);
    if (level == "avxvnni") need(kAvxVnni, lacks);
    if (avx512) need(kAvx512, lacks);
    if (amx) need(kAmx, lacks);
    if (!lacks.empty()) return lacks;
    const uint64_t wanted = 0x6 | (avx512 ? 0xe0 : 0) | (amx ? 0x60000 : 0);
    if ((saved_states() & wanted) != wanted) return "the operating system does not save its registers";
    return amx ? ask_for_tiles() : "";
}

#elif defined(__aarch64__)

inline std::string lacks_of(const std::string& level) {
    if (level == "portable") return "";
    bool dot = false, half = false;
#if defined(__linux__)
    const unsigned long have = getauxval(AT_HWCAP);
    dot = have >> 20 & 1, half = have >> 10 & 1;  // HWCAP_ASIMDDP, HWCAP_ASIMDHP
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    dot = sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
    half = sysctlbyname("hw.optional.arm.FEAT_FP16", &value, &size, nullptr, 0) == 0 && value;
#endif
    if (!dot) return "this CPU has no dotprod";
    return half ? "" : "this CPU has no fp16 arithmetic";
}

#else

inline std::string lacks_of(const std::string&) { return ""; }

#endif

}  // namespace gyrokv
