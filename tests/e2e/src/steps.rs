//! All fault points (`vmm/src/fault.rs`, `agent/src/fault.rs`), by the lists that the tests go through.

/// The steps of a process that stands for a container's, in the order in which they come.
pub const PROXY: [&str; 7] = [
    "proxy: forked",
    "proxy: set up",
    "proxy: told to go",
    "proxy: connected",
    "proxy: attaching streams",
    "proxy: process ended",
    "proxy: output written",
];

/// The steps of the command line that runs a container in the foreground.
pub const FOREGROUND: [&str; 8] = [
    "client: started",
    "client: server started",
    "client: container created",
    "client: container started",
    "client: container exited",
    "client: output written",
    "client: container deleted",
    "client: server ended",
];

/// The steps of one that makes a container in the background, until it has let that stay.
pub const BACKGROUND: [&str; 5] = [
    "client: server started",
    "client: stand-in forked",
    "client: container created",
    "client: container made",
    "client: stand-in stands",
];

/// The steps of one that executes a process.
pub const EXECUTING: [&str; 2] = ["client: process described", "client: process started"];

/// The step of one that waits for a process whose output has ended.
pub const ASKING_AGAIN: &str = "client: server answered after the output";

/// The steps of the server, in the order in which they come.
pub const SERVER: [&str; 21] = [
    "server: started",
    "server: spec validated",
    "server: share made",
    "server: VMM started",
    "server: mounts made",
    "server: vCPUs run",
    "server: agent called",
    "server: agent greeted",
    "server: container created",
    "server: container started",
    "server: process described",
    "server: process executed",
    "server: process exited",
    "server: process deleted",
    "server: signal delivered",
    "server: container exited",
    "server: deletion asked",
    "server: container forgotten",
    "server: sandbox ends",
    "server: VM ended",
    "server: cleaned",
];

/// The step that it has besides where the host has cgroup v2.
pub const CGROUP_MADE: &str = "server: cgroup made";

/// The steps of the VMM.
pub const VMM: [&str; 12] = [
    "vmm: vmm started",
    "vmm: boot requested",
    "vmm: memory mapped",
    "vmm: vm created",
    "vmm: kernel loaded",
    "vmm: vcpus created",
    "vmm: devices ready",
    "vmm: first KVM_RUN",
    "vmm: init started",
    "vmm: agent ready",
    "vmm: shutdown requested",
    "vmm: ended",
];

/// The steps that it has besides when the guest leaves a template.
pub const SAVING: [&str; 2] = ["vmm: agent prepared", "vmm: template saved"];

/// The steps that it has in place of some when the guest is made from a template.
pub const RESTORING: [&str; 2] = ["vmm: restore requested", "vmm: template mapped"];

/// The steps of the agent, each with the command that fails of it; none where nobody waits for the guest any more.
pub const AGENT: [(&str, &str); 25] = [
    ("init", "create"),
    ("root", "create"),
    ("cgroups", "create"),
    ("share", "create"),
    ("prepared", "create"),
    ("dialling", "create"),
    ("serving", "create"),
    ("create-asked", "create"),
    ("create-forked", "create"),
    ("create-set-up", "create"),
    ("start-asked", "start"),
    ("start-executed", "start"),
    ("exec-asked", "exec"),
    ("exec-forked", "exec"),
    ("exec-joined", "exec"),
    ("exec-executed", "exec"),
    ("signal-asked", "kill"),
    ("init-ended", ""),
    ("shutdown-asked", ""),
    ("shutdown-killed", ""),
    ("shutdown-released", ""),
    // Not the agent itself, but its child that becomes the container's init.
    ("init-forked", "create"),
    ("init-namespaces", "create"),
    ("init-root", "create"),
    ("init-executes", "exec"),
];

/// The steps of a process on its way into a container, each with the commands that fail of its end.
pub const JOINER: [(&str, &[&str]); 3] = [
    ("joiner-forked", &["exec", "exec"]),
    ("joiner-joined", &["exec", "exec"]),
    // By then the program is taken for executed: in the background nobody but who waits for it learns of the end.
    ("process-executes", &["exec"]),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    /// Calls whose argument is not a step's name, by how that begins, and the steps that they are.
    const NOT_LITERAL: [(&str, &[&str]); 7] = [
        // Inside of the timelines, which all steps pass.
        ("name)", &[]),
        ("step)", &[]),
        ("format_args!(\"vmm: {name}\")", &[]),
        // Marks that a guest makes: the VMM's own steps, and what a hostile one makes up.
        ("BOOT_MARK_", &[]),
        ("STEP_PREPARED)", &[bulkhead_protocol::STEP_PREPARED]),
        ("&format!(\"guest mark {other}\")", &[]),
        (
            "if exec_id.as_ref().is_empty() {",
            &["server: container exited", "server: process exited"],
        ),
    ];

    fn listed() -> BTreeSet<String> {
        let named = [
            &PROXY[..],
            &FOREGROUND,
            &BACKGROUND,
            &EXECUTING,
            &[ASKING_AGAIN],
            &SERVER,
            &[CGROUP_MADE],
            &VMM,
            &SAVING,
            &RESTORING,
        ];
        let named = named.into_iter().flatten().copied();
        let of_the_guest = AGENT.iter().map(|(step, _)| *step);
        let joining = JOINER.iter().map(|(step, _)| *step);
        let all = named.chain(of_the_guest).chain(joining);
        all.map(str::to_owned).collect()
    }

    /// The steps that a file's code comes to. A timeline puts `prefix` before their names.
    fn steps_of(file: &Path, prefix: &str) -> Vec<String> {
        let text = fs::read_to_string(file).unwrap();
        let (code, _tests) = text.split_once("mod tests {").unwrap_or((&text, ""));
        let mut steps = Vec::new();
        for (call, prefix) in [("mark(", prefix), ("point(", "")] {
            for (at, _) in code.match_indices(call) {
                let (before, after) = (&code[..at], code[at + call.len()..].trim_start());
                if before.ends_with("fn ")
                    || before.ends_with(|c: char| c == '_' || c.is_alphanumeric())
                {
                    continue;
                }
                if let Some(literal) = after.strip_prefix('"') {
                    steps.push(format!("{prefix}{}", literal.split('"').next().unwrap()));
                } else {
                    let known = NOT_LITERAL
                        .iter()
                        .find(|(known, _)| after.starts_with(known));
                    let line = after.lines().next().unwrap();
                    let (_, known) = known.unwrap_or_else(|| panic!("{file:?}: {call}{line}"));
                    steps.extend(known.iter().map(|&step| step.to_owned()));
                }
            }
        }
        steps
    }

    fn collect(folder: &Path, prefix: &str, steps: &mut BTreeSet<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, prefix, steps);
            } else if path.extension().is_some_and(|kind| kind == "rs")
                && !path.ends_with("tests.rs")
            {
                steps.extend(steps_of(&path, prefix));
            }
        }
    }

    #[test]
    fn every_fault_point_is_on_a_list_and_nothing_else_is() {
        let mut steps = BTreeSet::new();
        for (package, prefix) in [
            ("runtime", ""),
            ("shim", ""),
            ("vmm", "vmm: "),
            ("agent", ""),
        ] {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
            collect(&root.join(package).join("src"), prefix, &mut steps);
        }
        let listed = listed();
        let unlisted: Vec<_> = steps.difference(&listed).collect();
        assert!(unlisted.is_empty(), "no test goes through {unlisted:?}");
        let unknown: Vec<_> = listed.difference(&steps).collect();
        assert!(unknown.is_empty(), "no code comes to {unknown:?}");
    }
}
