//! What a guest boots: Debian's kernel for clouds, and an initramfs with the modules it needs and busybox.
//!
//! The package is taken apart, not installed: nothing of the host's own kernel changes. All is kept in `target/vm`,
//! and fetched again where Debian has a newer one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// The package that depends on the newest kernel for clouds.
const NEWEST: &str = "linux-image-cloud-amd64";

/// What the guest needs before its root is there, and what sandboxes need that is not built in. Each brings along
/// what it depends on.
const MODULES: &[&str] =
    &["virtio_pci", "virtio_blk", "virtiofs", "overlay", "loop", "veth", "nf_tables", "nft_chain_nat"];

/// A kernel, and the initramfs that goes with it.
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    pub(super) initramfs: PathBuf,
}

/// Gets the kernel into `dir`, if it is not there, and packs an initramfs whose first program is `init`.
///
/// # Errors
/// That Debian's packages cannot be had, or what could not be run or written.
pub(super) fn get(dir: &Path, init: &str) -> anyhow::Result<Kernel> {
    let package = package()?;
    let unpacked = dir.join(&package);
    let version = package.trim_start_matches("linux-image-").to_owned();
    let image = unpacked.join("boot").join(format!("vmlinuz-{version}"));
    if !image.exists() {
        fetch(dir, &package, &unpacked)?;
    }
    let initramfs = dir.join("initramfs");
    pack(&unpacked.join("lib/modules").join(&version), init, &dir.join("initramfs.d"), &initramfs)?;
    Ok(Kernel { image, initramfs })
}

/// The package of the newest kernel.
fn package() -> anyhow::Result<String> {
    let shown = output(Command::new("apt-cache").args(["depends", NEWEST]))?;
    let names = shown.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let name = names.map(str::trim).find(|name| name.starts_with("linux-image-"));
    Ok(name.with_context(|| format!("{NEWEST} is no package here"))?.to_owned())
}

fn fetch(dir: &Path, package: &str, unpacked: &Path) -> anyhow::Result<()> {
    eprintln!("fetching {package}");
    let download = dir.join("download");
    let _ = fs::remove_dir_all(&download);
    fs::create_dir_all(&download).with_context(|| format!("create {}", download.display()))?;
    output(Command::new("apt-get").args(["download", "--quiet", package]).current_dir(&download))?;
    let archive = fs::read_dir(&download)?.flatten().map(|entry| entry.path()).next();
    let archive = archive.with_context(|| format!("apt-get download {package} left nothing"))?;
    let draft = dir.join("draft");
    let _ = fs::remove_dir_all(&draft);
    output(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&draft))?;
    fs::remove_dir_all(&download)?;
    let _ = fs::remove_dir_all(unpacked);
    fs::rename(&draft, unpacked).with_context(|| format!("rename {}", draft.display()))
}

/// Packs busybox, the modules in the order in which they can be loaded, and `init`.
fn pack(modules: &Path, init: &str, tree: &Path, archive: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_dir_all(tree);
    for dir in ["bin", "modules"] {
        fs::create_dir_all(tree.join(dir)).with_context(|| format!("create {}", tree.join(dir).display()))?;
    }
    fs::copy("/bin/busybox", tree.join("bin/busybox")).context("copy /bin/busybox")?;
    let mut known = BTreeMap::new();
    find_modules(modules, &mut known)?;
    let mut order = Vec::new();
    for name in MODULES {
        load_order(name, &known, &mut order)?;
    }
    let mut list = String::new();
    for name in &order {
        fs::copy(&known[name], tree.join("modules").join(name))
            .with_context(|| format!("copy module {name}"))?;
        list.push_str(name);
        list.push('\n');
    }
    fs::write(tree.join("modules/order"), list)?;
    fs::write(tree.join("init"), init)?;
    let script = "chmod 755 init && busybox find . | busybox cpio -o -H newc 2>/dev/null";
    let packed =
        Command::new("sh").args(["-c", script]).current_dir(tree).output().context("run busybox cpio")?;
    if !packed.status.success() {
        bail!("busybox cpio: {}", String::from_utf8_lossy(&packed.stderr).trim());
    }
    fs::write(archive, packed.stdout).with_context(|| format!("write {}", archive.display()))
}

/// Every module below a directory, by the name that others call it.
fn find_modules(dir: &Path, found: &mut BTreeMap<String, PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))?.flatten() {
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find_modules(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "ko") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().replace('-', "_");
            found.insert(name, path);
        }
    }
    Ok(())
}

/// Appends a module after those that it depends on. Its own `.modinfo` names them: `depends=a,b`.
fn load_order(name: &str, known: &BTreeMap<String, PathBuf>, order: &mut Vec<String>) -> anyhow::Result<()> {
    if order.iter().any(|done| done == name) {
        return Ok(());
    }
    let path = known.get(name).with_context(|| format!("the kernel has no module {name}"))?;
    let module = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let fields = module.split(|byte| *byte == 0).filter_map(|field| field.strip_prefix(b"depends="));
    let depends: Vec<String> = fields.map(|field| String::from_utf8_lossy(field).into_owned()).collect();
    for other in depends.iter().flat_map(|field| field.split(',')).filter(|other| !other.is_empty()) {
        load_order(&other.replace('-', "_"), known, order)?;
    }
    order.push(name.to_owned());
    Ok(())
}

/// Runs a command for what it prints.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
