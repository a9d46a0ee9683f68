//! `linux.resources.devices`: which devices a container may use, as an eBPF program on its cgroup.
//!
//! cgroup v2 has no files for it. The program is asked for each open and mknod of a device with the wanted kinds of
//! access, and goes through the rules from the last to the first: a denying rule that matches ends it, an allowing
//! one settles the kinds of access that it names. This gives each kind of access what v1's list gave it. Kernel:
//! `struct bpf_cgroup_dev_ctx` in `linux/bpf.h`.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use nix::errno::Errno;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Context, Error, Result};

const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// A rule; `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

impl Rule {
    const fn allow(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Self {
        Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }

    /// Whether it has no effect before a rule that allows all that it is about.
    fn is_settled_by(&self, later: &Self) -> bool {
        fn within(mine: Option<i32>, theirs: Option<i32>) -> bool {
            theirs.is_none() || mine == theirs
        }
        later.allow
            && self.access & !later.access == 0
            && within(self.kind, later.kind)
            && within(self.major, later.major)
            && within(self.minor, later.minor)
    }

    fn matches_everything(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

/// What every container may do, whatever the spec says; runc's list: make nodes, and use the default devices and
/// terminals.
const DEFAULT_RULES: [Rule; 11] = [
    Rule::allow(CHARACTER, None, None, MKNOD),
    Rule::allow(BLOCK, None, None, MKNOD),
    Rule::allow(CHARACTER, Some(1), Some(3), ALL),
    Rule::allow(CHARACTER, Some(1), Some(5), ALL),
    Rule::allow(CHARACTER, Some(1), Some(7), ALL),
    Rule::allow(CHARACTER, Some(1), Some(8), ALL),
    Rule::allow(CHARACTER, Some(1), Some(9), ALL),
    Rule::allow(CHARACTER, Some(5), Some(0), ALL),
    Rule::allow(CHARACTER, Some(5), Some(2), ALL),
    Rule::allow(CHARACTER, Some(10), Some(200), ALL),
    Rule::allow(CHARACTER, Some(136), None, ALL),
];

/// The rules of one container, the default ones included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceFilter(Vec<Rule>);

/// The program that denies all but what every container may do, which is all that many ask for. Loaded ahead: the kernel takes long
/// to verify a program.
static USUAL: OnceLock<OwnedFd> = OnceLock::new();

impl DeviceFilter {
    /// Checks the spec's rules.
    pub fn from_spec(devices: &[LinuxDeviceCgroup]) -> Result<Self> {
        let mut rules = Vec::with_capacity(devices.len() + DEFAULT_RULES.len());
        for (index, device) in devices.iter().enumerate() {
            let rule = rule(device, &format!("linux.resources.devices[{index}]"))?;
            // Engines begin with denying all, as nothing else is allowed here, and name the default devices once more.
            let denies_nothing = !rule.allow && rules.is_empty();
            if !denies_nothing && !DEFAULT_RULES.iter().any(|later| rule.is_settled_by(later)) {
                rules.push(rule);
            }
        }
        rules.extend(DEFAULT_RULES);
        Ok(Self(rules))
    }

    fn usual() -> Self {
        Self(DEFAULT_RULES.to_vec())
    }

    /// Loads the program that most containers will want.
    pub fn load_ahead() -> nix::Result<()> {
        let program = load(&Self::usual().program())?;
        let _ = USUAL.set(program);
        Ok(())
    }

    /// Puts the program on a cgroup.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> Result<()> {
        let what = || "linux.resources.devices: cannot put the device filter on the cgroup";
        match USUAL.get() {
            Some(usual) if self.0 == DEFAULT_RULES => attach(usual, cgroup).what(what),
            _ => {
                let program = load(&self.program()).what(what)?;
                attach(&program, cgroup).what(what)
            }
        }
    }

    /// Compiles the rules.
    fn program(&self) -> Vec<Instruction> {
        let mut code = vec![
            // r2 = access << 16 | type; r3 = access; r4 = major; r5 = minor.
            Instruction::load(2, 0),
            Instruction::load(4, 4),
            Instruction::load(5, 8),
            Instruction::register(MOV64_REGISTER, 3, 2),
            Instruction::immediate(RIGHT_SHIFT64, 3, 16),
            Instruction::immediate(AND64, 2, 0xffff),
        ];
        for rule in self.0.iter().rev() {
            rule.compile(&mut code);
            if rule.matches_everything() {
                // What comes before it never counts.
                break;
            }
        }
        code.extend(Instruction::return_value(0));
        code
    }
}

impl Rule {
    fn compile(&self, code: &mut Vec<Instruction>) {
        let body = if self.allow {
            let [set, exit] = Instruction::return_value(1);
            vec![
                Instruction::immediate(AND64, 3, !self.access),
                Instruction::jump(NOT_EQUAL, 3, 0, 2),
                set,
                exit,
            ]
        } else {
            let [set, exit] = Instruction::return_value(0);
            vec![
                Instruction::register(MOV64_REGISTER, 0, 3),
                Instruction::immediate(AND64, 0, self.access),
                Instruction::jump(EQUAL, 0, 0, 2),
                set,
                exit,
            ]
        };
        let conditions = [(2, self.kind), (4, self.major), (5, self.minor)];
        let conditions: Vec<_> = conditions
            .into_iter()
            .filter_map(|(register, value)| Some((register, value?)))
            .collect();
        for (position, (register, value)) in conditions.iter().enumerate() {
            // Over the conditions that follow, and the body: a dozen at most.
            let skip = (conditions.len() - position - 1 + body.len()) as i16;
            code.push(Instruction::jump(NOT_EQUAL, *register, *value, skip));
        }
        code.extend(body);
    }
}

fn rule(device: &LinuxDeviceCgroup, field: &str) -> Result<Rule> {
    let mut access = 0;
    for letter in device.access().as_deref().unwrap_or_default().chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => {
                return Err(Error::spec(
                    format!("{field}.access"),
                    "must be of the letters r, w, m",
                ));
            }
        };
    }
    let kind = match device.typ().unwrap_or_default() {
        // As in v1, "all" means all: whatever else the rule says.
        LinuxDeviceType::A => {
            return Ok(Rule {
                allow: device.allow(),
                kind: None,
                major: None,
                minor: None,
                access: ALL,
            });
        }
        LinuxDeviceType::B => BLOCK,
        LinuxDeviceType::C | LinuxDeviceType::U => CHARACTER,
        LinuxDeviceType::P => {
            return Err(Error::spec(
                format!("{field}.type"),
                "must be one of a, b, c",
            ));
        }
    };
    let number = |name: &str, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => i32::try_from(value)
            .ok()
            .filter(|value| *value >= 0)
            .map(Some)
            .ok_or_else(|| Error::spec(format!("{field}.{name}"), "out of range")),
    };
    Ok(Rule {
        allow: device.allow(),
        kind: Some(kind),
        major: number("major", device.major())?,
        minor: number("minor", device.minor())?,
        access,
    })
}

/// `struct bpf_insn`; the registers share a byte, destination low.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const MOV64_REGISTER: u8 = 0xbf;
const MOV64: u8 = 0xb7;
const AND64: u8 = 0x57;
const RIGHT_SHIFT64: u8 = 0x77;
const EQUAL: u8 = 0x15;
const NOT_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

impl Instruction {
    const fn load(register: u8, offset: i16) -> Self {
        // From where r1 points: the context.
        Self {
            code: LOAD_WORD,
            registers: register | 1 << 4,
            offset,
            immediate: 0,
        }
    }

    const fn register(code: u8, to: u8, from: u8) -> Self {
        Self {
            code,
            registers: to | from << 4,
            offset: 0,
            immediate: 0,
        }
    }

    const fn immediate(code: u8, register: u8, immediate: i32) -> Self {
        Self {
            code,
            registers: register,
            offset: 0,
            immediate,
        }
    }

    const fn jump(code: u8, register: u8, immediate: i32, offset: i16) -> Self {
        Self {
            code,
            registers: register,
            offset,
            immediate,
        }
    }

    const fn return_value(value: i32) -> [Self; 2] {
        [
            Self::immediate(MOV64, 0, value),
            Self::immediate(EXIT, 0, 0),
        ]
    }
}

/// The part of `union bpf_attr` that BPF_PROG_LOAD reads, as far as we fill it.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part that BPF_PROG_ATTACH reads.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> nix::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the attributes, and the instructions and the license they point to, live across the call; the size is
    // that of the attributes, and the count that of the instructions.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attributes,
            size_of::<LoadAttributes>(),
        )
    };
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the system call has just returned this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach(program: &OwnedFd, cgroup: BorrowedFd<'_>) -> nix::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    // Containers that divide their cgroup may add filters; this one stays.
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd().unsigned_abs(),
        program: program.as_raw_fd().unsigned_abs(),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attributes live across the call, and the size is their own.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attributes,
            size_of::<AttachAttributes>(),
        )
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn filter(rules: Value) -> Result<DeviceFilter> {
        DeviceFilter::from_spec(&serde_json::from_value::<Vec<_>>(rules).unwrap())
    }

    /// Runs a program as the kernel would; panics on anything the compiler does not make.
    fn allowed(filter: &DeviceFilter, kind: i32, major: i64, minor: i64, access: i64) -> bool {
        let code = filter.program();
        let context = [i64::from(kind) | access << 16, major, minor];
        let mut registers = [0i64; 11];
        let mut next = 0usize;
        loop {
            let instruction = code[next];
            next += 1;
            let to = usize::from(instruction.registers & 0xf);
            let from = usize::from(instruction.registers >> 4);
            let immediate = i64::from(instruction.immediate);
            match instruction.code {
                LOAD_WORD => registers[to] = context[instruction.offset as usize / 4],
                MOV64_REGISTER => registers[to] = registers[from],
                MOV64 => registers[to] = immediate,
                AND64 => registers[to] &= immediate,
                RIGHT_SHIFT64 => registers[to] >>= immediate,
                EQUAL if registers[to] == immediate => next += instruction.offset as usize,
                NOT_EQUAL if registers[to] != immediate => next += instruction.offset as usize,
                EQUAL | NOT_EQUAL => {}
                EXIT => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
        }
    }

    const RW: i64 = (READ | WRITE) as i64;
    const M: i64 = MKNOD as i64;

    #[test]
    fn without_rules_the_default_devices_are_all_there_is() {
        let filter = filter(json!([])).unwrap();
        assert!(allowed(&filter, CHARACTER, 1, 3, RW));
        assert!(allowed(&filter, CHARACTER, 136, 7, RW));
        assert!(allowed(&filter, BLOCK, 8, 0, M));
        assert!(!allowed(&filter, BLOCK, 8, 0, READ.into()));
        assert!(!allowed(&filter, CHARACTER, 1, 1, RW));
        assert!(!allowed(&filter, BLOCK, 1, 3, RW));
    }

    #[test]
    fn the_last_rule_counts_for_each_kind_of_access() {
        let filter = filter(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "r"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "w"},
            {"allow": true, "type": "b", "major": 8, "access": "rw"},
            {"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"}
        ]))
        .unwrap();
        assert!(allowed(&filter, CHARACTER, 10, 229, RW));
        assert!(!allowed(&filter, CHARACTER, 10, 230, RW));
        assert!(allowed(&filter, BLOCK, 8, 0, RW));
        assert!(allowed(&filter, BLOCK, 8, 1, READ.into()));
        assert!(!allowed(&filter, BLOCK, 8, 1, RW));
        assert!(!allowed(&filter, BLOCK, 8, 1, WRITE.into()));
    }

    #[test]
    fn rules_that_repeat_the_default_ones_make_no_longer_program() {
        let usual = filter(json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": false, "type": "c", "major": 136, "minor": 2, "access": "w"},
            {"allow": true, "type": "b", "access": "m"}
        ]))
        .unwrap();
        assert_eq!(usual, DeviceFilter::usual());
        assert_eq!(filter(json!([])).unwrap(), DeviceFilter::usual());
        let more = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 5, "minor": 1, "access": "rwm"},
            {"allow": true, "type": "b", "access": "rm"}
        ]);
        let more = filter(more).unwrap();
        assert_eq!(more.0.len(), DeviceFilter::usual().0.len() + 2);
        assert!(allowed(&more, CHARACTER, 5, 1, RW));
        assert!(allowed(&more, BLOCK, 8, 0, READ.into()));
    }

    #[test]
    fn all_may_be_allowed() {
        let filter = filter(json!([
            {"allow": false, "type": "b", "major": 8, "access": "rwm"},
            {"allow": true, "type": "a", "access": "rwm"}
        ]))
        .unwrap();
        assert!(allowed(&filter, BLOCK, 8, 0, RW));
        assert!(allowed(&filter, CHARACTER, 1, 1, RW | M));
    }

    #[test]
    fn broken_rules_are_refused() {
        for (rule, field) in [
            (json!({"allow": true, "type": "c", "access": "x"}), "access"),
            (json!({"allow": true, "type": "p", "access": "r"}), "type"),
            (
                json!({"allow": true, "type": "c", "major": -2, "access": "r"}),
                "major",
            ),
            (
                json!({"allow": true, "type": "c", "minor": 1_i64 << 40, "access": "r"}),
                "minor",
            ),
        ] {
            let message = filter(json!([rule])).unwrap_err().to_string();
            assert!(
                message.starts_with(&format!("linux.resources.devices[0].{field}: ")),
                "{message}"
            );
        }
    }
}
