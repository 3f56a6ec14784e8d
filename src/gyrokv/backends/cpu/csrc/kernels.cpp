// The kernels of one instruction set; compiled once for each with -DGYROKV_ISA=<name>.
#include "attend.h"
#include "encode.h"

#define GYROKV_JOIN_(a, b) a##b
#define GYROKV_JOIN(a, b) GYROKV_JOIN_(a, b)
#define GYROKV_TEXT_(a) #a
#define GYROKV_TEXT(a) GYROKV_TEXT_(a)

extern "C" {
extern const gyrokv::Kernels GYROKV_JOIN(gyrokv_kernels_, GYROKV_ISA);
const gyrokv::Kernels GYROKV_JOIN(gyrokv_kernels_, GYROKV_ISA) = {
    GYROKV_TEXT(GYROKV_ISA),
    gyrokv::GYROKV_ISA::attend_scratch,
    gyrokv::GYROKV_ISA::attend,
    gyrokv::GYROKV_ISA::finish,
    gyrokv::GYROKV_ISA::encode_scratch,
    gyrokv::GYROKV_ISA::encode,
};
}
