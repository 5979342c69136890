//! The architecture, held by a check: who may import whom, where unsafe code may be, how long a file is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::Value;

/// Each crate of the workspace, and which of the others it may use; see ARCHITECTURE.md.
const MAY_USE: &[(&str, &[&str])] = &[
    ("hutch-proto", &[]),
    ("hutch-sandbox-sys", &[]),
    ("hutch-sandbox", &["hutch-proto", "hutch-sandbox-sys"]),
    ("hutch-layers", &["hutch-proto"]),
    ("hutch-queue", &["hutch-proto"]),
    ("hutch-worker", &["hutch-proto", "hutch-sandbox", "hutch-layers", "hutch-queue"]),
    ("hutch-gateway", &["hutch-proto", "hutch-layers", "hutch-queue"]),
    (
        "hutch",
        &["hutch-proto", "hutch-sandbox", "hutch-layers", "hutch-queue", "hutch-worker", "hutch-gateway"],
    ),
    ("hutch-bench", &["hutch-proto", "hutch-sandbox"]),
    ("hutch-tests", &["hutch-proto", "hutch-sandbox", "hutch-layers", "hutch-queue"]),
    ("xtask", &[]),
];

/// The only crate with unsafe code.
const UNSAFE_HOME: &str = "crates/sandbox-sys/";
/// A file that is longer has outgrown its room.
const MAX_LINES: usize = 600;

/// Everything; the first broken rule ends it.
pub(crate) fn run() -> anyhow::Result<()> {
    imports()?;
    let mut files = Vec::new();
    for dir in ["proto", "crates", "services", "tests", "xtask"] {
        rust_files(Path::new(dir), &mut files)?;
    }
    for file in &files {
        let text = fs::read_to_string(file)?;
        let shown = file.display();
        let unsafe_lines = text.lines().filter(|line| has_unsafe(line)).count();
        if unsafe_lines > 0 && !file.starts_with(UNSAFE_HOME) {
            bail!("{shown}: unsafe code belongs in {UNSAFE_HOME}");
        }
        let lines = text.lines().count();
        if lines > MAX_LINES {
            bail!("{shown}: {lines} lines; a file has at most {MAX_LINES}");
        }
    }
    eprintln!("architecture: {} files are where they belong", files.len());
    Ok(())
}

/// Whether a line opens unsafe code; comments and texts may speak of it.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default().trim_start();
    ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|form| code.contains(form))
        && !code.contains('"')
}

fn imports() -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("cargo metadata")?;
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = MAY_USE.iter().find(|(known, _)| *known == name) else {
            bail!("{name}: a crate that xtask/src/check.rs does not know; say there what it may use");
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = dependency["name"].as_str().unwrap_or_default();
            let ours = MAY_USE.iter().any(|(known, _)| *known == used);
            if ours && !allowed.contains(&used) {
                bail!("{name} uses {used}, which ARCHITECTURE.md does not allow");
            }
        }
    }
    Ok(())
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name == "target");
        if path.is_dir() && !hidden {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_code_is_seen_and_talk_of_it_is_not() {
        assert!(has_unsafe("    let x = unsafe { f() };"));
        assert!(has_unsafe("pub unsafe fn f() {}"));
        assert!(!has_unsafe("// unsafe { f() }"));
        assert!(!has_unsafe("let words = [\"unsafe {\"];"));
    }
}
