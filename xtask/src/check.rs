//! The architecture, held by a check: who may import whom, where unsafe code may be, how long a file is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::threat_table;

/// Each crate of the workspace, and which of the others it may use; see ARCHITECTURE.md.
const MAY_USE: &[(&str, &[&str])] = &[
    ("hutch-proto", &[]),
    ("hutch-sandbox-sys", &[]),
    ("hutch-sandbox", &["hutch-proto", "hutch-sandbox-sys", "hutch-trees"]),
    ("hutch-layers", &["hutch-proto", "hutch-trees"]),
    ("hutch-trees", &["hutch-proto"]),
    ("hutch-queue", &["hutch-proto"]),
    ("hutch-worker", &["hutch-proto", "hutch-sandbox", "hutch-layers", "hutch-queue"]),
    ("hutch-gateway", &["hutch-proto", "hutch-layers", "hutch-queue"]),
    (
        "hutch",
        &["hutch-proto", "hutch-sandbox", "hutch-layers", "hutch-queue", "hutch-worker", "hutch-gateway"],
    ),
    ("hutch-bench", &["hutch-proto", "hutch-sandbox"]),
    ("hutch-tests", &["hutch-proto", "hutch-sandbox", "hutch-layers", "hutch-queue"]),
    ("hutch-weak", &["hutch", "hutch-sandbox"]),
    ("xtask", &[]),
];

/// The only crate with unsafe code.
const UNSAFE_HOME: &str = "crates/sandbox-sys/";
/// A file that is longer has outgrown its room.
const MAX_LINES: usize = 600;

/// Everything; the first broken rule ends it.
pub(crate) fn run() -> anyhow::Result<()> {
    imports(&metadata()?)?;
    let mut files = Vec::new();
    for dir in ["proto", "crates", "services", "tests", "xtask"] {
        rust_files(Path::new(dir), &mut files)?;
    }
    for file in &files {
        source(file, &fs::read_to_string(file)?)?;
    }
    threat_table::complete()?;
    eprintln!("architecture: {} files are where they belong", files.len());
    Ok(())
}

/// What holds for one file.
fn source(file: &Path, text: &str) -> anyhow::Result<()> {
    let shown = file.display();
    if text.lines().any(has_unsafe) && !file.starts_with(UNSAFE_HOME) {
        bail!("{shown}: unsafe code belongs in {UNSAFE_HOME}");
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        bail!("{shown}: {lines} lines; a file has at most {MAX_LINES}");
    }
    Ok(())
}

/// Whether a line opens unsafe code; comments and texts may speak of it.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default().trim_start();
    ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"].iter().any(|form| code.contains(form))
        && !code.contains('"')
}

fn metadata() -> anyhow::Result<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()
        .context("cargo metadata")?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Who imports whom, tests too, by what cargo knows of the workspace.
fn imports(metadata: &Value) -> anyhow::Result<()> {
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
    fn an_import_that_is_not_allowed_is_named() {
        let using = |name: &str, used: &str, kind: Value| {
            let dependency = serde_json::json!({"name": used, "kind": kind});
            imports(&serde_json::json!({"packages": [{"name": name, "dependencies": [dependency]}]}))
        };
        for (name, used, kind) in [
            ("hutch-gateway", "hutch-sandbox", Value::Null),
            ("hutch-proto", "hutch-queue", "dev".into()),
            ("hutch-sandbox-sys", "hutch-proto", "build".into()),
            ("hutch-new", "serde", Value::Null),
        ] {
            let broken = using(name, used, kind).expect_err(name).to_string();
            assert!(broken.starts_with(name), "{broken}");
        }
        using("hutch-gateway", "hutch-queue", Value::Null).expect("allowed");
        using("hutch-proto", "serde", Value::Null).expect("not ours");
        imports(&metadata().expect("cargo metadata")).expect("this workspace");
    }

    #[test]
    fn a_file_that_breaks_a_rule_is_named() {
        let check = |path: &str, text: &str| source(Path::new(path), text).map_err(|error| error.to_string());
        let here = "fn f() { unsafe { g() } }\n";
        assert_eq!(check("crates/sandbox-sys/src/a.rs", here), Ok(()));
        assert!(check("crates/queue/src/a.rs", here).expect_err("unsafe").contains("crates/queue/src/a.rs"));
        let long = "\n".repeat(MAX_LINES + 1);
        assert!(check("proto/src/a.rs", &long).expect_err("long").contains("601 lines"));
    }

    #[test]
    fn unsafe_code_is_seen_and_talk_of_it_is_not() {
        assert!(has_unsafe("    let x = unsafe { f() };"));
        assert!(has_unsafe("pub unsafe fn f() {}"));
        assert!(!has_unsafe("// unsafe { f() }"));
        assert!(!has_unsafe("let words = [\"unsafe {\"];"));
    }
}
