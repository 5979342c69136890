//! What an escape checker makes of a sandbox: `cepheus` (PyPI), whose enumerator is a shell script that looks around a
//! container, and whose analysis looks for chains of techniques that lead out of what it saw.
//!
//! The script runs in a job and outside; both findings are analysed outside. Outside it must find chains, or its finding
//! none inside would say nothing. `cargo xtask test` installs it in `target/tools`.

use std::path::{Path, PathBuf};
use std::process::Command;

use hutch_tests::house::House;
use hutch_tests::hutch::Home;
use hutch_tests::tools;
use serde_json::{Value, json};

/// The chains that lead out of what the script saw.
fn chains(cepheus: &Path, house: &House, name: &str, seen: &[u8]) -> Vec<Value> {
    let posture: Value = serde_json::from_slice(seen)
        .unwrap_or_else(|e| panic!("{name}: {e}: {}", String::from_utf8_lossy(seen)));
    assert!(posture["mounts"].as_array().is_some_and(|mounts| !mounts.is_empty()), "{name}: {posture}");
    let (posture, report) = (house.file(&format!("{name}.json"), &posture.to_string()), house.path("report"));
    let output = Command::new(cepheus)
        .args(["analyze", &posture, "--format", "json", "--output"])
        .arg(&report)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert!(report["total_techniques_checked"].as_u64() > Some(20), "{}", report["total_techniques_checked"]);
    report["chains"].as_array().unwrap().clone()
}

/// The script that looks around, in the package's own directory.
fn enumerator(cepheus: &Path) -> PathBuf {
    let output = Command::new(cepheus.with_file_name("python"))
        .args(["-c", "import cepheus; print(cepheus.__path__[0])"])
        .output()
        .unwrap();
    Path::new(String::from_utf8_lossy(&output.stdout).trim()).join("enumerator/cepheus-enum.sh")
}

/// A layer that hides the container runtimes among the host's programs: of a runc that is installed the checker believes
/// that it runs the job, and has chains for its version.
fn without_runtimes(house: &House) -> PathBuf {
    let layer = house.path("without-runtimes");
    for dir in ["usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin"] {
        std::fs::create_dir_all(layer.join(dir)).unwrap();
        for program in ["runc", "crun", "containerd"] {
            std::fs::write(layer.join(dir).join(program), "").unwrap();
        }
    }
    layer
}

#[test]
fn an_escape_checker_finds_no_way_out() {
    let Some(house) = House::with_sandboxes() else { return };
    let Some(cepheus) = tools::find("cepheus") else {
        return hutch_tests::skip(
            "escape checker",
            "cepheus-engine is not installed: `cargo xtask test` does",
        );
    };
    let script = enumerator(&cepheus);
    let outside = Command::new("sh").arg(&script).output().unwrap();
    let outside = chains(&cepheus, &house, "outside", &outside.stdout);
    eprintln!("{} chains lead out of this host", outside.len());
    if outside.is_empty() {
        return hutch_tests::skip("escape checker", "it finds no way out of this host either");
    }
    let script = std::fs::read_to_string(script).unwrap();
    let layer = format!("dir:{}", without_runtimes(&house).display());
    for user in ["1001:1001", "root"] {
        let spec = json!({
            "layers": ["host", layer], "command": ["sh", "/box/look"], "user": user,
            "files": [{"path": "/box/look", "text": script}],
        });
        let result = Home::new().run(&spec).unwrap();
        assert_eq!(result.exit_code, Some(0), "{}", result.message);
        let inside = chains(&cepheus, &house, "inside", &result.stdout.data);
        assert_eq!(inside, Vec::<Value>::new(), "as {user}");
    }
}
