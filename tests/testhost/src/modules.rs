//! Which kernel modules the emulated host loads, and in which order: `modules.dep` as written by depmod.

use std::collections::{HashMap, HashSet};

/// What the init needs before it can mount the root, and the point of it all: KVM.
pub const BOOT: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm_amd",
];

/// What container engines and network plugins expect to find. The rest is loaded on demand by modprobe.
pub const EXTRA: &[&str] = &[
    // No line of modules.dep says so, but libcrc32c (connection tracking) asks the crypto layer for it when loaded.
    "crc32c_generic",
    "veth",
    "bridge",
    "br_netfilter",
    "nf_tables",
    "nft_compat",
    "tun",
    "ip_tables",
    "iptable_nat",
    "iptable_filter",
    "xt_conntrack",
    "xt_MASQUERADE",
    "xt_addrtype",
    "cls_u32",
    "act_mirred",
    "sch_ingress",
    "vhost_vsock",
    "vhost_net",
    "fuse",
    "loop",
];

/// What can be wrong with the list of modules.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// Neither in `modules.dep` nor in `modules.builtin`.
    #[error("the kernel package has no module {0}")]
    Unknown(String),
    /// `modules.dep` names a dependency that has no line of its own.
    #[error("modules.dep: {0} is needed but not listed")]
    Dangling(String),
    /// A dependency leads back to its dependent.
    #[error("modules.dep: {0} depends on itself")]
    Cycle(String),
}

/// The dependencies of every module of one kernel.
pub struct Dependencies<'a> {
    /// Path of a module -> paths of what it needs.
    needs: HashMap<&'a str, Vec<&'a str>>,
    /// Normalised name -> path.
    paths: HashMap<String, &'a str>,
    builtin: HashSet<String>,
}

impl<'a> Dependencies<'a> {
    /// Reads `modules.dep` and `modules.builtin` (depmod(8), modules.dep(5)).
    pub fn parse(dep: &'a str, builtin: &str) -> Self {
        let mut needs = HashMap::new();
        let mut paths = HashMap::new();
        for line in dep.lines() {
            if let Some((path, rest)) = line.split_once(':') {
                needs.insert(path, rest.split_whitespace().collect());
                paths.insert(name_of(path), path);
            }
        }
        let builtin = builtin.lines().map(name_of).collect();
        Self {
            needs,
            paths,
            builtin,
        }
    }

    /// The paths to load, in order, so that all of `names` are there at the end. Built-in ones need nothing.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<&'a str>, ModuleError> {
        let mut order = Order {
            dependencies: self,
            done: HashSet::new(),
            under_way: HashSet::new(),
            list: vec![],
        };
        for name in names {
            let name = name_of(name);
            match self.paths.get(&name) {
                Some(path) => order.visit(path)?,
                None if self.builtin.contains(&name) => {}
                None => return Err(ModuleError::Unknown(name)),
            }
        }
        Ok(order.list)
    }
}

/// A depth-first walk; what is needed comes before what needs it.
struct Order<'d, 'a> {
    dependencies: &'d Dependencies<'a>,
    done: HashSet<&'a str>,
    under_way: HashSet<&'a str>,
    list: Vec<&'a str>,
}

impl<'a> Order<'_, 'a> {
    fn visit(&mut self, path: &'a str) -> Result<(), ModuleError> {
        if self.done.contains(path) {
            return Ok(());
        }
        if !self.under_way.insert(path) {
            return Err(ModuleError::Cycle(path.into()));
        }
        let dependencies = self.dependencies;
        let needs = dependencies
            .needs
            .get(path)
            .ok_or_else(|| ModuleError::Dangling(path.into()))?;
        for need in needs {
            self.visit(need)?;
        }
        self.under_way.remove(path);
        self.done.insert(path);
        self.list.push(path);
        Ok(())
    }
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` -> `kvm_amd`: the kernel treats `-` and `_` alike.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    let stem = file.split(".ko").next().unwrap_or(file);
    stem.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/fs/9p/9p.ko: kernel/fs/fscache/fscache.ko kernel/fs/netfs/netfs.ko kernel/net/9p/9pnet.ko
kernel/fs/fscache/fscache.ko: kernel/fs/netfs/netfs.ko
kernel/fs/netfs/netfs.ko:
kernel/net/9p/9pnet.ko:
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko kernel/drivers/virtio/virtio.ko
kernel/drivers/virtio/virtio.ko:
kernel/arch/x86/kvm/kvm-amd.ko: kernel/arch/x86/kvm/kvm.ko
kernel/arch/x86/kvm/kvm.ko:
";

    fn position(order: &[&str], part: &str) -> usize {
        order.iter().position(|p| p.contains(part)).unwrap()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let all = Dependencies::parse(DEP, "");
        let order = all.load_order(&["9pnet_virtio", "9p", "kvm-amd"]).unwrap();
        assert_eq!(order.len(), 8);
        assert!(position(&order, "netfs.ko") < position(&order, "fscache.ko"));
        assert!(position(&order, "fscache.ko") < position(&order, "/9p.ko"));
        assert!(position(&order, "9pnet.ko") < position(&order, "9pnet_virtio.ko"));
        assert!(position(&order, "kvm.ko") < position(&order, "kvm-amd.ko"));
    }

    #[test]
    fn dashes_and_underscores_name_the_same_module() {
        let all = Dependencies::parse(DEP, "");
        assert_eq!(
            all.load_order(&["kvm_amd"]).unwrap(),
            all.load_order(&["kvm-amd"]).unwrap()
        );
    }

    #[test]
    fn built_in_modules_need_no_loading_and_unknown_ones_are_an_error() {
        let all = Dependencies::parse(DEP, "kernel/drivers/char/virtio_console.ko\n");
        assert_eq!(all.load_order(&["virtio-console"]), Ok(vec![]));
        assert_eq!(
            all.load_order(&["veth"]),
            Err(ModuleError::Unknown("veth".into()))
        );
    }

    #[test]
    fn a_cycle_or_a_dangling_dependency_ends_in_an_error() {
        let cycle = Dependencies::parse("a.ko: b.ko\nb.ko: a.ko\n", "");
        assert!(matches!(
            cycle.load_order(&["a"]),
            Err(ModuleError::Cycle(_))
        ));
        let dangling = Dependencies::parse("a.ko: b.ko\n", "");
        assert_eq!(
            dangling.load_order(&["a"]),
            Err(ModuleError::Dangling("b.ko".into()))
        );
    }
}
