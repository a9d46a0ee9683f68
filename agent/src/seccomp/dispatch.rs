//! One filter of the filters of several architectures.
//!
//! libseccomp can make it in one go, but takes twice as long over that as over the parts, for each container. And it knows nothing of system calls that are newer than the profile: a C library that tries one falls
//! back to an old one when it hears ENOSYS, and fails on anything else. So, as runc does, calls with numbers above the
//! highest that a strict profile names get ENOSYS before the profile is asked.

use libseccomp::ScmpArch;

use super::tree;

/// Bit of the numbers of x32's calls, which share an architecture with x86-64's (`__X32_SYSCALL_BIT`).
pub const X32: u32 = 1 << 30;

/// `linux/audit.h`.
pub const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// `linux/audit.h`.
pub const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// Offset in `struct seccomp_data`.
pub const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// The filter of one architecture.
pub struct Part {
    /// x86-64, x86 or x32.
    pub architecture: ScmpArch,
    /// The highest number that the profile names, if those above are to get ENOSYS.
    pub last: Option<u32>,
    /// What to return for calls whose number alone decides; sorted.
    pub plain: Vec<(u32, u32)>,
    /// The filter of the others.
    pub program: Vec<libc::sock_filter>,
}

/// Joins the parts, of which one is x86-64's. Calls of other architectures end the thread, as libseccomp has it.
pub fn join(parts: Vec<Part>) -> Vec<libc::sock_filter> {
    let (mut native, mut x32, mut x86) = (Vec::new(), None, None);
    for part in parts {
        match part.architecture {
            ScmpArch::X32 => x32 = Some(part.body()),
            ScmpArch::X86 => x86 = Some(part.body()),
            _ => native = part.body(),
        }
    }
    // Behind these instructions follow x86-64's, x32's and x86's.
    let to_x86 = native.len() + x32.as_ref().map_or(0, Vec::len);
    let mut program = vec![load(ARCHITECTURE)];
    let x32_choice: &[_] = match &x32 {
        None => &[],
        Some(_) => &[
            load(NUMBER),
            jump(libc::BPF_JSET, X32, 0, 1),
            always(native.len()),
        ],
    };
    if x86.is_some() {
        program.push(jump(libc::BPF_JEQ, AUDIT_ARCH_I386, 0, 1));
        program.push(always(2 + x32_choice.len() + to_x86));
    }
    program.push(jump(libc::BPF_JEQ, AUDIT_ARCH_X86_64, 1, 0));
    program.push(returning(libc::SECCOMP_RET_KILL_THREAD));
    program.extend_from_slice(x32_choice);
    program.extend(native);
    program.extend(x32.into_iter().flatten());
    program.extend(x86.into_iter().flatten());
    program
}

impl Part {
    fn body(self) -> Vec<libc::sock_filter> {
        let no_such_call = returning(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs());
        let mut body = match (self.architecture, self.last) {
            (_, None) => Vec::new(),
            // Without a part of their own, x32's calls are x86-64's part's to refuse.
            (ScmpArch::X8664, Some(last)) => vec![
                load(NUMBER),
                jump(libc::BPF_JSET, X32, 2, 0),
                jump(libc::BPF_JGT, last, 0, 1),
                no_such_call,
            ],
            (_, Some(last)) => vec![load(NUMBER), jump(libc::BPF_JGT, last, 0, 1), no_such_call],
        };
        body.extend(tree::program(&self.plain));
        body.extend(self.program);
        body
    }
}

/// One instruction.
pub fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

/// One instruction.
pub fn jump(comparison: u32, value: u32, if_true: u8, if_false: u8) -> libc::sock_filter {
    let code = libc::BPF_JMP | comparison | libc::BPF_K;
    instruction(code, if_true, if_false, value)
}

/// One instruction.
pub fn always(skip: usize) -> libc::sock_filter {
    // A program that is too long for this is refused by its length.
    let skip = u32::try_from(skip).unwrap_or(u32::MAX);
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, skip)
}

/// One instruction.
pub fn returning(action: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    // Every code of the classic instruction set fits into its 16 bits.
    let code = code as u16;
    libc::sock_filter { code, jt, jf, k }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// What a filter returns for a call, by an interpreter of the instructions that filters are made of.
    pub fn result(
        program: &[libc::sock_filter],
        architecture: u32,
        number: u32,
        arguments: [u64; 6],
    ) -> u32 {
        let mut data = vec![number, architecture, 0, 0];
        data.extend(
            arguments
                .iter()
                .flat_map(|&argument| [argument as u32, (argument >> 32) as u32]),
        );
        let mut accumulator = 0;
        let mut next = 0;
        loop {
            let instruction = program[next];
            let k = instruction.k;
            next += 1;
            let taken = match u32::from(instruction.code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = data[k as usize / 4];
                    continue;
                }
                code if code == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => {
                    accumulator &= k;
                    continue;
                }
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code if code == libc::BPF_JMP | libc::BPF_JA => {
                    next += k as usize;
                    continue;
                }
                code if code == libc::BPF_JMP | libc::BPF_JEQ => accumulator == k,
                code if code == libc::BPF_JMP | libc::BPF_JGT => accumulator > k,
                code if code == libc::BPF_JMP | libc::BPF_JGE => accumulator >= k,
                code if code == libc::BPF_JMP | libc::BPF_JSET => accumulator & k != 0,
                code => panic!("unknown instruction {code:#x}"),
            };
            next += usize::from(if taken {
                instruction.jt
            } else {
                instruction.jf
            });
        }
    }

    const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

    fn part(architecture: ScmpArch, last: u32, answer: u32) -> Part {
        Part {
            architecture,
            last: Some(last),
            plain: vec![(7, 70)],
            program: vec![returning(answer)],
        }
    }

    #[test]
    fn each_architecture_is_judged_by_its_own_part_and_newer_calls_do_not_exist() {
        let program = join(vec![
            part(ScmpArch::X8664, 400, 1),
            part(ScmpArch::X86, 300, 2),
            part(ScmpArch::X32, X32 | 500, 3),
        ]);
        for (architecture, number, answer) in [
            (AUDIT_ARCH_X86_64, 400, 1),
            (AUDIT_ARCH_X86_64, 7, 70),
            (AUDIT_ARCH_I386, 7, 70),
            (AUDIT_ARCH_X86_64, 401, NO_SUCH_CALL),
            (AUDIT_ARCH_X86_64, X32 | 500, 3),
            (AUDIT_ARCH_X86_64, X32 | 501, NO_SUCH_CALL),
            (AUDIT_ARCH_I386, 300, 2),
            (AUDIT_ARCH_I386, 301, NO_SUCH_CALL),
            (0x1234, 5, libc::SECCOMP_RET_KILL_THREAD),
        ] {
            assert_eq!(
                result(&program, architecture, number, [0; 6]),
                answer,
                "{architecture:#x} {number}"
            );
        }
    }

    #[test]
    fn an_architecture_without_a_part_is_refused() {
        let native = join(vec![part(ScmpArch::X8664, 400, 1)]);
        let kill = libc::SECCOMP_RET_KILL_THREAD;
        assert_eq!(result(&native, AUDIT_ARCH_I386, 5, [0; 6]), kill);
        // libseccomp's own filter of x86-64 refuses what is x32's.
        assert_eq!(result(&native, AUDIT_ARCH_X86_64, X32 | 1, [0; 6]), 1);
        assert_eq!(
            result(&native, AUDIT_ARCH_X86_64, 401, [0; 6]),
            NO_SUCH_CALL
        );
    }
}
