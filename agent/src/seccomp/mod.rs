//! `linux.seccomp`: from the spec's profile to a filter program, and the loading of it.
//!
//! libseccomp compiles the profile in the agent, once a container; what the container's init (or a process that
//! joins the container) does is one system call. The order relative to capabilities and `no_new_privs` is runc's and
//! stands in [`crate::process`].

mod dispatch;
mod tree;

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use libseccomp::error::SeccompErrno;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::errno::Errno;
use oci_spec::runtime as oci;

use crate::error::{Context, Error, Kind, Result};
use dispatch::Part;

/// Arguments of a system call, at most.
const MAX_ARGUMENTS: usize = 6;

/// What an action returns that has no `errnoRet`, as in runc.
const DEFAULT_ERRNO: u16 = libc::EPERM as u16;

/// The kernel's bound for a program (`BPF_MAXINSNS`).
const MAX_PROGRAM: usize = 4096;

/// A compiled profile.
pub struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Filter")
            .field("instructions", &self.program.len())
            .field("flags", &self.flags)
            .finish()
    }
}

impl Filter {
    /// Compiles a profile. System calls that libseccomp doesn't know are passed over, as by runc: profiles name
    /// those of all kernels and architectures.
    pub fn from_spec(profile: &oci::LinuxSeccomp) -> Result<Self> {
        let field = "linux.seccomp";
        if profile
            .listener_path()
            .as_ref()
            .is_some_and(|path| !path.as_os_str().is_empty())
        {
            return Err(Error::spec(
                format!("{field}.listenerPath"),
                "the listener is a process of the host, which can't look into a guest; remove it",
            ));
        }
        let default = action(
            profile.default_action(),
            profile.default_errno_ret(),
            &format!("{field}.defaultAction"),
        )?;
        // With a permissive default, what is newer than the profile is allowed anyway, or a tracer's to judge.
        let newer_do_not_exist = !matches!(
            default,
            ScmpAction::Allow
                | ScmpAction::Log
                | ScmpAction::Trace(_)
                | ScmpAction::Errno(libc::ENOSYS)
        );
        let rules = rules(profile, default)?;
        let part = |architecture| {
            let (plain, others) = divide(&rules, architecture);
            Ok(Part {
                architecture,
                last: last_syscall(profile, architecture)
                    .filter(|_| newer_do_not_exist && is_named(profile, architecture)),
                plain,
                program: export(&compile(&others, default, &[architecture])?)?,
            })
        };
        let parts = architectures(profile).into_iter().map(part);
        let program = dispatch::join(parts.collect::<Result<_>>()?);
        if program.len() > MAX_PROGRAM {
            return Err(Error::spec(
                field,
                format!(
                    "the filter has {} instructions, the kernel takes {MAX_PROGRAM}; name fewer system calls",
                    program.len()
                ),
            ));
        }
        Ok(Self {
            program,
            flags: flags(profile),
        })
    }

    /// Puts this process under the filter. Needs `no_new_privs` or CAP_SYS_ADMIN.
    pub fn load(&self) -> Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.program.len()).unwrap_or(u16::MAX),
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads `program` and the instructions, which live across the call; it writes neither.
        Errno::result(unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        })
        .map(drop)
        .what(|| "linux.seccomp: cannot load the filter")
    }
}

fn flags(profile: &oci::LinuxSeccomp) -> libc::c_ulong {
    use oci::LinuxSeccompFilterFlag as Flag;
    profile
        .flags()
        .iter()
        .flatten()
        .map(|flag| match flag {
            Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // A process that has just been forked has one thread, and without a listener nothing waits for it.
            Flag::SeccompFilterFlagTsync | Flag::SeccompFilterFlagWaitKillableRecv => 0,
        })
        .fold(0, |all, flag| all | flag)
}

fn action(action: oci::LinuxSeccompAction, errno: Option<u32>, field: &str) -> Result<ScmpAction> {
    use oci::LinuxSeccompAction as Action;
    let value = || match errno {
        None => Ok(DEFAULT_ERRNO),
        Some(value) => u16::try_from(value)
            .map_err(|_| Error::spec(field, format!("its errno {value} is out of range"))),
    };
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActErrno => ScmpAction::Errno(value()?.into()),
        Action::ScmpActTrace => ScmpAction::Trace(value()?),
        Action::ScmpActLog => ScmpAction::Log,
        Action::ScmpActAllow => ScmpAction::Allow,
        Action::ScmpActNotify => {
            return Err(Error::spec(
                field,
                "SCMP_ACT_NOTIFY needs a listener, which is a process of the host and can't look into a guest; \
                 use another action",
            ));
        }
    })
}

fn architecture(architecture: oci::Arch) -> ScmpArch {
    use oci::Arch;
    match architecture {
        Arch::ScmpArchNative => ScmpArch::native(),
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchParisc => ScmpArch::Parisc,
        Arch::ScmpArchParisc64 => ScmpArch::Parisc64,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        Arch::ScmpArchLoongarch64 => ScmpArch::Loongarch64,
        Arch::ScmpArchM68k => ScmpArch::M68k,
        Arch::ScmpArchSh => ScmpArch::Sh,
        Arch::ScmpArchSheb => ScmpArch::Sheb,
    }
}

/// The profile's architectures that the guest's kernel has, and always its own. A rule for another processor's can
/// never match.
fn architectures(profile: &oci::LinuxSeccomp) -> Vec<ScmpArch> {
    let mut list = vec![ScmpArch::X8664];
    for &named in profile.architectures().iter().flatten() {
        let named = architecture(named);
        if matches!(named, ScmpArch::X86 | ScmpArch::X32) && !list.contains(&named) {
            list.push(named);
        }
    }
    list
}

/// Whether a profile names an architecture. Of one that it does not name runc says nothing of newer calls, even if it is the processor's.
fn is_named(profile: &oci::LinuxSeccomp, which: ScmpArch) -> bool {
    let mut named = profile.architectures().iter().flatten();
    named.any(|&named| architecture(named) == which)
}

/// A rule for one system call.
struct Rule {
    field: String,
    name: String,
    syscall: ScmpSyscall,
    action: ScmpAction,
    /// All must hold.
    conditions: Vec<ScmpArgCompare>,
}

fn rules(profile: &oci::LinuxSeccomp, default: ScmpAction) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    for (index, rule) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{index}]");
        let action = action(rule.action(), rule.errno_ret(), &format!("{field}.action"))?;
        let alternatives = conditions(rule.args().as_deref().unwrap_or_default(), &field)?;
        // What the default does needs no rule, and libseccomp takes none.
        if action == default {
            continue;
        }
        for name in rule.names() {
            if name.is_empty() {
                return Err(Error::spec(format!("{field}.names"), "holds an empty name"));
            }
            let Ok(syscall) = ScmpSyscall::from_name(name) else {
                tracing::debug!(name, "linux.seccomp: unknown system call passed over");
                continue;
            };
            rules.extend(alternatives.iter().map(|conditions| Rule {
                field: field.clone(),
                name: name.clone(),
                syscall,
                action,
                conditions: conditions.clone(),
            }));
        }
    }
    Ok(rules)
}

/// Tells the calls whose number alone decides, with what they return, from the rules for all others.
fn divide(rules: &[Rule], architecture: ScmpArch) -> (Vec<(u32, u32)>, Vec<&Rule>) {
    let mut plain: BTreeMap<u32, Option<ScmpAction>> = BTreeMap::new();
    let mut numbers = Vec::with_capacity(rules.len());
    for rule in rules {
        let number = ScmpSyscall::from_name_by_arch(&rule.name, architecture)
            .ok()
            .and_then(|syscall| u32::try_from(syscall.as_raw_syscall()).ok())
            .filter(|&number| architecture != ScmpArch::X86 || !is_shared(number));
        numbers.push(number);
        if let Some(number) = number {
            let answer = Some(rule.action).filter(|_| rule.conditions.is_empty());
            plain
                .entry(number)
                .and_modify(|known| *known = known.filter(|_| *known == answer))
                .or_insert(answer);
        }
    }
    let is_plain = |number: Option<u32>| {
        number.is_some_and(|number| matches!(plain.get(&number), Some(Some(_))))
    };
    let others = rules
        .iter()
        .zip(&numbers)
        .filter(|(_, number)| !is_plain(**number))
        .map(|(rule, _)| rule);
    let others = others.collect();
    let plain = plain
        .into_iter()
        .filter_map(|(number, action)| Some((number, returned(action?))))
        .collect();
    (plain, others)
}

/// Whether a call of x86 is one of those that can be made in two ways, of their own and through `socketcall` or
/// `ipc`: libseccomp knows how the two go together.
fn is_shared(number: u32) -> bool {
    const SOCKETCALL: u32 = 102;
    const IPC: u32 = 117;
    matches!(number, SOCKETCALL | IPC | 359..=373 | 393..=402)
}

/// What a filter returns for an action (`linux/seccomp.h`).
fn returned(action: ScmpAction) -> u32 {
    match action {
        ScmpAction::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        ScmpAction::Trap => libc::SECCOMP_RET_TRAP,
        ScmpAction::Errno(errno) => {
            libc::SECCOMP_RET_ERRNO | errno.unsigned_abs() & libc::SECCOMP_RET_DATA
        }
        ScmpAction::Trace(value) => libc::SECCOMP_RET_TRACE | u32::from(value),
        ScmpAction::Log => libc::SECCOMP_RET_LOG,
        ScmpAction::Allow => libc::SECCOMP_RET_ALLOW,
        // KillThread; the others can't come out of a profile.
        _ => libc::SECCOMP_RET_KILL_THREAD,
    }
}

fn compile(
    rules: &[&Rule],
    default: ScmpAction,
    architectures: &[ScmpArch],
) -> Result<ScmpFilterContext> {
    let library = |error: libseccomp::error::SeccompError| {
        Error::setup(
            Kind::Internal,
            format!("linux.seccomp: libseccomp: {error}"),
        )
    };
    let mut context = ScmpFilterContext::new(default).map_err(library)?;
    for &architecture in architectures {
        context.add_arch(architecture).map_err(library)?;
    }
    // A new context has it.
    if !architectures.contains(&ScmpArch::X8664) {
        context.remove_arch(ScmpArch::X8664).map_err(library)?;
    }
    for rule in rules {
        let added = if rule.conditions.is_empty() {
            context.add_rule(rule.action, rule.syscall)
        } else {
            context.add_rule_conditional(rule.action, rule.syscall, &rule.conditions)
        };
        let name = &rule.name;
        added.map_err(|error| match error.errno() {
            Some(SeccompErrno::EEXIST) => Error::spec(
                &rule.field,
                format!("a rule for {name} contradicts an earlier one"),
            ),
            _ => Error::spec(
                &rule.field,
                format!("no rule for {name} can be made: {error}"),
            ),
        })?;
    }
    Ok(context)
}

/// The conditions of a rule: alternatives, each a list of which all must hold. Several conditions on one argument
/// are alternatives, as they were before the spec could say more (runc keeps it so, and profiles rely on it).
fn conditions(arguments: &[oci::LinuxSeccompArg], field: &str) -> Result<Vec<Vec<ScmpArgCompare>>> {
    let mut uses = [0usize; MAX_ARGUMENTS];
    let mut all = Vec::with_capacity(arguments.len());
    for (index, argument) in arguments.iter().enumerate() {
        let number = argument.index();
        let count = uses.get_mut(number).ok_or_else(|| {
            Error::spec(
                format!("{field}.args[{index}].index"),
                "a system call has the arguments 0 to 5",
            )
        })?;
        *count += 1;
        all.push(condition(argument, number));
    }
    Ok(if uses.iter().any(|&count| count > 1) {
        all.into_iter().map(|condition| vec![condition]).collect()
    } else {
        vec![all]
    })
}

fn condition(argument: &oci::LinuxSeccompArg, number: usize) -> ScmpArgCompare {
    use oci::LinuxSeccompOperator as Operator;
    let (value, second) = (argument.value(), argument.value_two().unwrap_or_default());
    let (operator, datum) = match argument.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        Operator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
    };
    ScmpArgCompare::new(u32::try_from(number).unwrap_or(u32::MAX), operator, datum)
}

/// The program, through a file in memory: libseccomp writes it to a descriptor.
fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>> {
    let what = || "linux.seccomp: cannot take over the filter";
    let file = nix::sys::memfd::memfd_create(c"seccomp", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .what(what)?;
    let mut file = std::fs::File::from(file);
    context
        .export_bpf(&file)
        .map_err(|error| Error::setup(Kind::Internal, format!("{}: {error}", what())))?;
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut bytes))
        .what(what)?;
    Ok(bytes
        .as_chunks()
        .0
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
            code: u16::from_ne_bytes([c0, c1]),
            jt,
            jf,
            k: u32::from_ne_bytes([k0, k1, k2, k3]),
        })
        .collect())
}

/// The highest number that the profile names.
fn last_syscall(profile: &oci::LinuxSeccomp, architecture: ScmpArch) -> Option<u32> {
    let rules = profile.syscalls().iter().flatten();
    rules
        .flat_map(|rule| rule.names())
        .filter_map(|name| ScmpSyscall::from_name_by_arch(name, architecture).ok())
        // Negative ones stand for calls that the architecture has not.
        .filter_map(|syscall| u32::try_from(syscall.as_raw_syscall()).ok())
        .max()
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};
    use serde_json::{Value, json};

    use super::*;

    fn filter(profile: &Value) -> Result<Filter> {
        Filter::from_spec(&serde_json::from_value(profile.clone()).unwrap())
    }

    /// Where a child of this process ends that loads the filter and makes one system call.
    #[derive(Debug, PartialEq, Eq)]
    enum End {
        Returned(i64),
        Failed(i32),
        Killed(i32),
    }

    fn under(profile: &Value, syscall: libc::c_long, arguments: [u64; 2]) -> End {
        let filter = filter(profile).unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        // SAFETY: the child makes system calls only, and ends with one.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let _ = nix::sys::prctl::set_no_new_privs();
                // A filter that could not be loaded must not look like one that allows.
                let result = if filter.load().is_ok() {
                    // SAFETY: the tests make calls with arguments that are no pointers, or null.
                    let value = unsafe { libc::syscall(syscall, arguments[0], arguments[1], 0, 0) };
                    if value == -1 {
                        -i64::from(Errno::last_raw())
                    } else {
                        value
                    }
                } else {
                    i64::MIN
                };
                let _ = nix::unistd::write(&writer, &result.to_ne_bytes());
                // SAFETY: ends the process.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                drop(writer);
                let mut bytes = [0; 8];
                let length = reader.read(&mut bytes).unwrap();
                match waitpid(child, None).unwrap() {
                    WaitStatus::Signaled(_, signal, _) => End::Killed(signal as i32),
                    _ if length < bytes.len() => End::Killed(0),
                    _ => match i64::from_ne_bytes(bytes) {
                        value if value < 0 => End::Failed(i32::try_from(-value).unwrap()),
                        value => End::Returned(value),
                    },
                }
            }
        }
    }

    fn rule(action: &str) -> Value {
        json!({"names": ["getpriority"], "action": action})
    }

    fn allowing(rules: Value) -> Value {
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
    }

    #[test]
    fn every_action_does_what_its_name_says() {
        let sys = libc::SYS_getpriority;
        let table = [
            ("SCMP_ACT_KILL", End::Killed(libc::SIGSYS)),
            ("SCMP_ACT_KILL_THREAD", End::Killed(libc::SIGSYS)),
            ("SCMP_ACT_KILL_PROCESS", End::Killed(libc::SIGSYS)),
            ("SCMP_ACT_TRAP", End::Killed(libc::SIGSYS)),
            ("SCMP_ACT_ERRNO", End::Failed(libc::EPERM)),
            // Without a tracer there is nobody to ask.
            ("SCMP_ACT_TRACE", End::Failed(libc::ENOSYS)),
        ];
        for (action, end) in table {
            assert_eq!(
                under(&allowing(json!([rule(action)])), sys, [0; 2]),
                end,
                "{action}"
            );
        }
        for action in ["SCMP_ACT_LOG", "SCMP_ACT_ALLOW"] {
            let end = under(&allowing(json!([rule(action)])), sys, [0; 2]);
            assert!(matches!(end, End::Returned(_)), "{action}: {end:?}");
        }
    }

    #[test]
    fn an_errno_of_the_rule_or_of_the_default_is_returned() {
        let mut one = rule("SCMP_ACT_ERRNO");
        one["errnoRet"] = json!(77);
        assert_eq!(
            under(&allowing(json!([one])), libc::SYS_getpriority, [0; 2]),
            End::Failed(77)
        );
        let strict = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 88,
            "syscalls": [{
                "names": ["write", "exit_group", "prctl", "memfd_secret"], "action": "SCMP_ACT_ALLOW"
            }]
        });
        assert_eq!(
            under(&strict, libc::SYS_getpriority, [0; 2]),
            End::Failed(88)
        );
    }

    #[test]
    fn every_operator_compares_as_its_name_says() {
        // getpriority's second argument; which values are refused.
        for (operator, value, second, refused) in [
            ("SCMP_CMP_NE", 5, 0, [4, 6]),
            ("SCMP_CMP_LT", 5, 0, [3, 4]),
            ("SCMP_CMP_LE", 5, 0, [4, 5]),
            ("SCMP_CMP_EQ", 5, 0, [5, 5]),
            ("SCMP_CMP_GE", 5, 0, [5, 6]),
            ("SCMP_CMP_GT", 5, 0, [6, 7]),
            ("SCMP_CMP_MASKED_EQ", 0b110, 0b100, [4, 5]),
        ] {
            let mut one = rule("SCMP_ACT_ERRNO");
            one["errnoRet"] = json!(99);
            one["args"] = json!([{"index": 1, "value": value, "valueTwo": second, "op": operator}]);
            let profile = allowing(json!([one]));
            for argument in 3..=7 {
                let end = under(&profile, libc::SYS_getpriority, [0, argument]);
                let expected = match operator {
                    "SCMP_CMP_NE" => argument != 5,
                    "SCMP_CMP_LT" => argument < 5,
                    "SCMP_CMP_LE" => argument <= 5,
                    "SCMP_CMP_GE" => argument >= 5,
                    "SCMP_CMP_GT" => argument > 5,
                    _ => refused.contains(&argument),
                };
                assert_eq!(
                    end == End::Failed(99),
                    expected,
                    "{operator} {argument}: {end:?}"
                );
            }
        }
    }

    #[test]
    fn conditions_on_different_arguments_must_all_hold_and_those_on_one_are_alternatives() {
        let equal =
            |index: u32, value: u64| json!({"index": index, "value": value, "op": "SCMP_CMP_EQ"});
        let with = |arguments: Value| {
            let mut one = rule("SCMP_ACT_ERRNO");
            one["args"] = arguments;
            allowing(json!([one]))
        };
        let both = with(json!([equal(0, 1), equal(1, 2)]));
        let refused = |profile: &Value, arguments| {
            under(profile, libc::SYS_getpriority, arguments) == End::Failed(libc::EPERM)
        };
        assert!(refused(&both, [1, 2]));
        assert!(!refused(&both, [1, 3]));
        let either = with(json!([equal(1, 2), equal(1, 3)]));
        assert!(refused(&either, [1, 2]) && refused(&either, [1, 3]));
        assert!(!refused(&either, [1, 4]));
    }

    #[test]
    fn calls_that_are_newer_than_the_profile_do_not_exist() {
        let profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64"],
            "syscalls": [
                // The last of them is openat2, 437.
                {"names": ["write", "exit_group", "openat2", "no_such_call"], "action": "SCMP_ACT_ALLOW"}
            ]
        });
        assert_eq!(under(&profile, 437, [0; 2]), End::Failed(libc::EINVAL));
        assert_eq!(under(&profile, 438, [0; 2]), End::Failed(libc::ENOSYS));
        assert_eq!(under(&profile, 4000, [0; 2]), End::Failed(libc::ENOSYS));
        assert_eq!(
            under(&profile, libc::SYS_getpriority, [0; 2]),
            End::Failed(libc::EPERM)
        );
    }

    #[test]
    fn of_an_architecture_that_is_not_named_no_call_is_newer_than_the_profile() {
        let mut profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["write", "exit_group"], "action": "SCMP_ACT_ALLOW"}]
        });
        for (architectures, errno) in [
            (json!([]), libc::EPERM),
            (json!(["SCMP_ARCH_X86"]), libc::EPERM),
            (json!(["SCMP_ARCH_X86_64"]), libc::ENOSYS),
            (json!(["SCMP_ARCH_NATIVE"]), libc::ENOSYS),
        ] {
            profile["architectures"] = architectures;
            assert_eq!(
                under(&profile, 4000, [0; 2]),
                End::Failed(errno),
                "{profile}"
            );
        }
    }

    #[test]
    fn a_permissive_default_does_not_make_calls_vanish() {
        let profile = allowing(json!([{"names": ["chown"], "action": "SCMP_ACT_ERRNO"}]));
        let end = under(&profile, libc::SYS_getpriority, [0; 2]);
        assert!(matches!(end, End::Returned(_)), "{end:?}");
    }

    #[test]
    fn flags_reach_the_kernel() {
        let mut profile = allowing(json!([rule("SCMP_ACT_ERRNO")]));
        profile["flags"] = json!([
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
        ]);
        assert_eq!(
            filter(&profile).unwrap().flags,
            libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
        );
        assert_eq!(
            under(&profile, libc::SYS_getpriority, [0; 2]),
            End::Failed(libc::EPERM)
        );
    }

    /// Compares a filter with the one that libseccomp makes of the same profile in one go.
    /// False if neither takes it.
    fn compare(profile: &Value) -> bool {
        let profile: oci::LinuxSeccomp = serde_json::from_value(profile.clone()).unwrap();
        let default = action(profile.default_action(), profile.default_errno_ret(), "").unwrap();
        let rules = rules(&profile, default).unwrap();
        let all: Vec<&Rule> = rules.iter().collect();
        let whole = compile(&all, default, &architectures(&profile));
        let joined = Filter::from_spec(&profile);
        let (whole, joined) = match (whole, joined) {
            (Ok(whole), Ok(joined)) => (export(&whole).unwrap(), joined.program),
            (whole, joined) => {
                assert_eq!(whole.map(drop), joined.map(drop));
                return false;
            }
        };
        let values = [
            0,
            1,
            3,
            8,
            0x7e02_0000,
            0xffff_ffff,
            0x1_0000_0004,
            0x1_0000_0005,
        ];
        for architecture in [
            dispatch::AUDIT_ARCH_X86_64,
            dispatch::AUDIT_ARCH_I386,
            0xc000_00b7,
        ] {
            for number in (0..600).chain((0..600).map(|number| dispatch::X32 | number)) {
                for value in values {
                    let answer = |program| {
                        dispatch::tests::result(program, architecture, number, [value; 6])
                    };
                    assert_eq!(
                        answer(&joined),
                        answer(&whole),
                        "{architecture:#x} {number:#x} {value:#x}"
                    );
                }
            }
        }
        true
    }

    #[test]
    fn filters_answer_as_those_that_libseccomp_makes() {
        let names: Vec<String> = (0..450)
            .filter_map(|number| ScmpSyscall::from(number).get_name().ok())
            .chain(
                [
                    "recv",
                    "send",
                    "semop",
                    "msgget",
                    "_llseek",
                    "socketcall",
                    "ipc",
                    "waitpid",
                ]
                .map(str::to_owned),
            )
            .collect();
        let actions = [
            "ALLOW",
            "ERRNO",
            "KILL_PROCESS",
            "TRAP",
            "LOG",
            "TRACE",
            "KILL",
        ];
        let values = [0u64, 3, 8, 0x1_0000_0004];
        let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"];
        // A generator of its own (splitmix64), so that a failure can be repeated.
        let mut state = 7u64;
        let mut random = |below: usize| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ (mixed >> 31)) % below as u64) as usize
        };
        let mut compared = 0;
        for round in 0..25 {
            let mut rules = Vec::new();
            for _ in 0..1 + random(12) {
                let chosen: Vec<&str> = (0..1 + random(60))
                    .map(|_| names[random(names.len())].as_str())
                    .collect();
                let mut rule = json!({
                    "names": chosen,
                    "action": format!("SCMP_ACT_{}", actions[random(if round % 2 == 0 { 2 } else { 7 })]),
                });
                if random(3) == 0 {
                    let condition = |random: &mut dyn FnMut(usize) -> usize| {
                        json!({
                            "index": random(6), "value": values[random(4)],
                            "valueTwo": 0, "op": format!("SCMP_CMP_{}", operators[random(7)])
                        })
                    };
                    let count = 1 + random(2);
                    let conditions: Vec<_> = (0..count).map(|_| condition(&mut random)).collect();
                    rule["args"] = json!(conditions);
                }
                rules.push(rule);
            }
            let architectures = match random(3) {
                0 => json!(["SCMP_ARCH_X86_64"]),
                1 => json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]),
                _ => json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
            };
            // With this default nothing is said of newer calls, which libseccomp says nothing of.
            compared += usize::from(compare(&json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "defaultErrnoRet": 38,
                "architectures": architectures,
                "syscalls": rules
            })));
        }
        // The rules of the others contradict each other.
        assert!(compared >= 10, "{compared}");
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_the_name_of_its_field() {
        let rule = |rule: Value| allowing(json!([rule]));
        for (profile, field) in [
            (
                json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
                "linux.seccomp.defaultAction",
            ),
            (
                rule(json!({"names": ["chown"], "action": "SCMP_ACT_NOTIFY"})),
                "linux.seccomp.syscalls[0].action",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
                "linux.seccomp.listenerPath",
            ),
            (
                rule(json!({"names": [""], "action": "SCMP_ACT_ERRNO"})),
                "linux.seccomp.syscalls[0].names",
            ),
            (
                rule(json!({"names": ["chown"], "action": "SCMP_ACT_ERRNO", "errnoRet": 70000})),
                "linux.seccomp.syscalls[0].action",
            ),
            (
                rule(json!({"names": ["chown"], "action": "SCMP_ACT_ERRNO",
                            "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]})),
                "linux.seccomp.syscalls[0].args[0].index",
            ),
        ] {
            let error = filter(&profile).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{field}: ")), "{field}: {error}");
        }
    }
}
