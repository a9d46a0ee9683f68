//! What a filter says of system calls that are newer than its profile: that they don't exist.
//!
//! A C library that tries a new call falls back to an old one when it hears ENOSYS, and fails on anything else. So,
//! as runc does, calls with numbers above the highest that the profile names get ENOSYS before the profile is asked.

use libseccomp::ScmpArch;

/// Bit of the numbers of x32's calls, which share an architecture with x86-64's (`__X32_SYSCALL_BIT`).
const X32: u32 = 1 << 30;

/// `linux/audit.h`.
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// Instructions to put before a filter, given the highest number for each architecture; the last of them falls
/// through to the filter's first. Other architectures than those given are the filter's to judge.
pub fn program(last: &[(ScmpArch, u32)]) -> Vec<libc::sock_filter> {
    let of = |wanted| {
        last.iter()
            .find(|(architecture, _)| *architecture == wanted)
            .map(|&(_, number)| number)
    };
    let mut program = Vec::new();
    let native = of(ScmpArch::X8664);
    let x32 = of(ScmpArch::X32);
    if native.is_some() || x32.is_some() {
        // Where one of the two is not named, nothing is above its last.
        let (native, x32) = (native.unwrap_or(u32::MAX), x32.unwrap_or(u32::MAX));
        program.extend([
            load(ARCHITECTURE),
            jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 0, 5),
            load(NUMBER),
            jump(libc::BPF_JSET, X32, 1, 0),
            jump(libc::BPF_JGT, native, 1, 2),
            jump(libc::BPF_JGT, x32, 0, 1),
            no_such_call(),
        ]);
    }
    if let Some(number) = of(ScmpArch::X86) {
        program.extend([
            load(ARCHITECTURE),
            jump(libc::BPF_JEQ, AUDIT_ARCH_I386, 0, 3),
            load(NUMBER),
            jump(libc::BPF_JGT, number, 0, 1),
            no_such_call(),
        ]);
    }
    program
}

fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn jump(comparison: u32, value: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    instruction(
        libc::BPF_JMP | comparison | libc::BPF_K,
        if_true,
        if_false,
        value,
    )
}

fn no_such_call() -> libc::sock_filter {
    instruction(
        libc::BPF_RET | libc::BPF_K,
        0,
        0,
        libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs(),
    )
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    // Every code of the classic instruction set fits into its 16 bits.
    let code = code as u16;
    libc::sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets the stub: true if it says ENOSYS, false if it falls through.
    fn refuses(program: &[libc::sock_filter], architecture: u32, number: u32) -> bool {
        let mut accumulator = 0;
        let mut next = 0;
        while let Some(instruction) = program.get(next) {
            next += 1;
            let taken = match u32::from(instruction.code) & !(libc::BPF_K) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = if instruction.k == NUMBER {
                        number
                    } else {
                        architecture
                    };
                    continue;
                }
                code if code == libc::BPF_RET => return true,
                code if code == libc::BPF_JMP | libc::BPF_JEQ => accumulator == instruction.k,
                code if code == libc::BPF_JMP | libc::BPF_JGT => accumulator > instruction.k,
                code if code == libc::BPF_JMP | libc::BPF_JSET => accumulator & instruction.k != 0,
                code => panic!("unknown instruction {code:#x}"),
            };
            next += usize::from(if taken {
                instruction.jt
            } else {
                instruction.jf
            });
        }
        assert_eq!(next, program.len());
        false
    }

    #[test]
    fn calls_above_the_last_of_their_architecture_do_not_exist() {
        let all = program(&[
            (ScmpArch::X8664, 400),
            (ScmpArch::X86, 300),
            (ScmpArch::X32, X32 | 500),
        ]);
        for (architecture, number, refused) in [
            (AUDIT_ARCH_X86_64, 400, false),
            (AUDIT_ARCH_X86_64, 401, true),
            (AUDIT_ARCH_X86_64, X32 | 500, false),
            (AUDIT_ARCH_X86_64, X32 | 501, true),
            (AUDIT_ARCH_X86_64, X32 | 450, false),
            (AUDIT_ARCH_I386, 300, false),
            (AUDIT_ARCH_I386, 301, true),
            (0x1234, u32::MAX, false),
        ] {
            assert_eq!(
                refuses(&all, architecture, number),
                refused,
                "{architecture:#x} {number}"
            );
        }
    }

    #[test]
    fn an_architecture_that_is_not_named_is_left_to_the_filter() {
        let native = program(&[(ScmpArch::X8664, 400)]);
        assert!(!refuses(&native, AUDIT_ARCH_I386, 5000));
        assert!(!refuses(&native, AUDIT_ARCH_X86_64, X32 | 1));
        assert!(refuses(&native, AUDIT_ARCH_X86_64, 401));
        assert!(program(&[]).is_empty());
    }
}
