//! The tests' own programs in C, compiled once for each test program.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A program of `tests/programs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Ends in one well-known way.
    Probe,
    /// Tries what a sandbox must not let through.
    Attempt,
    /// Attacks by name, each of which says whether it got through.
    Hostile,
    /// A library that attacks the program into which it is preloaded.
    Preloaded,
}

impl Program {
    const ALL: [Self; 4] = [Self::Probe, Self::Attempt, Self::Hostile, Self::Preloaded];

    /// How it is linked.
    fn options(self) -> &'static [&'static str] {
        if self == Self::Preloaded { &["-shared", "-fPIC"] } else { &["-static", "-pthread"] }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Probe => "probe",
            Self::Attempt => "attempt",
            Self::Hostile => "hostile",
            Self::Preloaded => "preloaded",
        }
    }
}

/// The directory with `box/bin/NAME` for every program, to be stacked as a layer or run here; none where
/// they cannot be compiled. `HUTCH_TEST_PROGRAMS` names one that was made elsewhere. It is left to whoever cleans the
/// temporary directory's place: the build.
#[must_use]
pub fn layer() -> Option<&'static Path> {
    static LAYER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = LAYER.get_or_init(|| match compile() {
        Ok(dir) => Some(dir),
        Err(why) => {
            crate::skip("whatever needs a program in C", &why);
            None
        }
    });
    made.as_deref()
}

/// Where a program is on this host.
#[must_use]
pub fn on_host(program: Program) -> Option<PathBuf> {
    layer().map(|dir| dir.join("box/bin").join(program.name()))
}

/// Where a program is in a sandbox that has [`layer`].
#[must_use]
pub fn inside(program: Program) -> String {
    format!("/box/bin/{}", program.name())
}

fn compile() -> Result<PathBuf, String> {
    if let Some(made) = std::env::var_os("HUTCH_TEST_PROGRAMS") {
        return Ok(made.into());
    }
    let own = std::env::current_exe().map_err(|e| e.to_string())?;
    let name = own.file_name().unwrap_or_default().to_string_lossy();
    let target = own.ancestors().nth(2).ok_or("no target directory")?;
    let layer = target.join("test-programs").join(&*name);
    let bin = layer.join("box/bin");
    std::fs::create_dir_all(&bin).map_err(|e| format!("{}: {e}", bin.display()))?;
    for program in Program::ALL {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(program.name());
        let draft = bin.join(format!(".{}-{}", program.name(), std::process::id()));
        let output = Command::new("cc")
            .args(["-std=gnu11", "-O0", "-w"])
            .args(program.options())
            .arg("-o")
            .arg(&draft)
            .arg(source.with_extension("c"))
            .output()
            .map_err(|e| format!("cc: {e}"))?;
        if !output.status.success() {
            return Err(format!("cc: {}", String::from_utf8_lossy(&output.stderr)));
        }
        std::fs::rename(&draft, bin.join(program.name())).map_err(|e| format!("{}: {e}", bin.display()))?;
    }
    Ok(layer)
}
