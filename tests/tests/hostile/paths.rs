//! Attacks by paths and names that a spec gives, and by what is behind them when they are used.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use hutch_sandbox::Defence;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde_json::{Value, json};

use crate::attack::{Attack, Outcome};
use crate::site::{Site, job, text};

/// How often a race is run.
fn rounds(short: usize, long: usize) -> usize {
    if std::env::var_os("HUTCH_LONG_TESTS").is_some() { long } else { short }
}

/// Swaps two names with each other, over and over, while something else is done.
fn swapping<T>(one: &Path, other: &Path, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                renameat2(AT_FDCWD, one, AT_FDCWD, other, RenameFlags::RENAME_EXCHANGE).unwrap();
            }
        });
        let answer = work();
        done.store(true, Ordering::Relaxed);
        answer
    })
}

/// Where volumes are mounted is decided by a directory that another job swaps for a link meanwhile.
fn swap_mount_targets(site: &Site) -> Outcome {
    let shared = site.allowed().join("shared");
    fs::create_dir_all(shared.join("place/deep")).unwrap();
    let _ = symlink("/", shared.join("link"));
    let before = site.roots();
    let spec = job(
        &["sh", "-c", "grep -c ' /a/place/deep/hutch-v ' /proc/mounts"],
        &json!({"user": "root", "volumes": [
            {"host_path": shared, "target": "/a", "read_only": false},
            {"volume": "other", "target": "/a/place/deep/hutch-v"},
        ]}),
    );
    let count = rounds(150, 10_000);
    let mut refused = 0;
    swapping(&shared.join("place"), &shared.join("link"), || {
        for _ in 0..count {
            refused += usize::from(site.job(&spec)["status"] != "succeeded");
        }
    });
    let made = ["deep", "hutch-v", "deep/hutch-v"]
        .map(|name| Path::new("/").join(name))
        .iter()
        .any(|path| path.exists());
    let after = site.roots();
    let seen = format!(
        "{count} races, {refused} elsewhere inside or refused, {} files in the launcher's root",
        after - before
    );
    Outcome::held_if(!made && after == before, seen)
}

#[test]
fn a08_mount_targets_that_are_swapped() {
    Attack::new(
        "8: swap a mount's target for a link while it is mounted (CVE-2021-30465)",
        "targets are descriptors, resolved within the root",
        swap_mount_targets,
    )
    .control(|| Ok("the names are swapped all the time".to_owned()))
    .bites_without(&[Defence::ScopedPaths])
    .run();
}

const SECRET: &str = "hutch-canary-of-a-secret";

/// A secret beside what is allowed, and specs that ask for it by another name.
fn forbidden_volumes(site: &Site) -> Outcome {
    let allowed = site.allowed();
    let secret = site.place("secret");
    fs::write(secret.join("secret"), SECRET).unwrap();
    fs::create_dir_all(allowed.join("a")).unwrap();
    let _ = symlink(&secret, allowed.join("link"));
    let _ = symlink("/", allowed.join("root"));
    let named = format!("root{}", secret.display());
    let paths = [
        allowed.join("../places/secret"),
        allowed.join("a/../../places/secret"),
        allowed.join("link"),
        allowed.join(named),
        secret.clone(),
        PathBuf::from("/proc/self/root").join(secret.strip_prefix("/").unwrap()),
    ];
    let read = |path: &Path| {
        let more = json!({"user": "root", "volumes": [{"host_path": path, "target": "/v"}]});
        text(&site.job(&job(&["sh", "-c", "cat /v/secret 2> /dev/null; true"], &more))["stdout"])
    };
    let mut through: Vec<_> = paths
        .iter()
        .filter(|path| read(path).contains(SECRET))
        .map(|path| path.display().to_string())
        .collect();
    fs::create_dir_all(allowed.join("swapped")).unwrap();
    let _ = symlink(&secret, allowed.join("to-secret"));
    let count = rounds(100, 2_000);
    swapping(&allowed.join("swapped"), &allowed.join("to-secret"), || {
        let won = (0..count).filter(|_| read(&allowed.join("swapped")).contains(SECRET)).count();
        if won > 0 {
            through.push(format!("{won} of {count} races"));
        }
    });
    Outcome::of(
        &through,
        format!("{} names and {count} races are refused or show what is allowed", paths.len()),
    )
}

#[test]
fn a09_volumes_that_are_not_allowed() {
    Attack::new(
        "9: a volume by `..` or by a link, also one that is swapped meanwhile",
        "below a directory that the config allows, by descriptors, no link followed",
        forbidden_volumes,
    )
    .control(|| Ok("the same names are opened by whoever opens paths".to_owned()))
    .bites_without(&[Defence::AllowedPaths])
    .run();
}

/// Whatever a job leaves leads elsewhere, or is too deep to be removed by its path.
fn leave_links(site: &Site) -> Outcome {
    let canary = site.allowed().join("canary");
    fs::create_dir_all(&canary).unwrap();
    fs::write(canary.join("kept"), SECRET).unwrap();
    let script = format!(
        "cd /kept; ln -s {canary} out; ln -s / root; mkdir -p deep; cd deep; \
         i=0; while [ $i -lt 300 ]; do mkdir d; ln -s {canary} l; cd d; i=$((i + 1)); done; \
         cd /tmp; ln -s {canary} out; rm -rf /var/tmp; ln -s {canary} /var/tmp; mkdir -p /box/o; ln -s {canary} /box/o/out",
        canary = canary.display()
    );
    let more = json!({
        "user": "root", "outputs": {"paths": ["/box/**", "/tmp/**"]},
        "volumes": [{"volume": "kept", "target": "/kept"}],
    });
    site.stdout(&job(&["sh", "-c", &script], &more));
    let volume = site.data().join("volumes/kept");
    let removed = swapping_links(&volume, || {
        site.command(&[], &["volume", "remove", "kept"]).env("HUTCH__DATA_DIR", site.data()).output().unwrap()
    });
    let said = String::from_utf8_lossy(&removed.stderr);
    let kept = fs::read_to_string(canary.join("kept")).unwrap_or_default();
    Outcome::held_if(kept == SECRET && !volume.exists(), format!("the canary reads `{kept}`; {said}"))
}

/// While the volume is removed, its directory is swapped for the link in it.
fn swapping_links<T>(volume: &Path, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let _ = renameat2(
                    AT_FDCWD,
                    &volume.join("deep"),
                    AT_FDCWD,
                    &volume.join("out"),
                    RenameFlags::RENAME_EXCHANGE,
                );
            }
        });
        let answer = work();
        done.store(true, Ordering::Relaxed);
        answer
    })
}

#[test]
fn a10_cleaning_up_outside() {
    Attack::new(
        "10: have the cleaning-up delete what links lead to (CVE-2024-23652)",
        "what a job writes is on a file system of its own, and goes with it; volumes are removed by descriptors",
        leave_links,
    )
    .control(|| Ok("the links lead to the canary".to_owned()))
    .has_no_switch("nothing is deleted by a path")
    .run();
}

#[test]
fn a11_ids_that_are_paths() {
    Attack::new(
        "11: a job id such as `../x`, one with NUL, one of 300 characters",
        "an id is a UUID by its type",
        |site| {
            let before = hutch_tests::processes::size(&site.data()).0;
            let long = "a".repeat(300);
            let ids = [
                "../../x",
                "..",
                "/etc/passwd",
                "a\0b",
                long.as_str(),
                "",
                "%2e%2e%2fx",
                "0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a3/",
            ];
            let mut through = Vec::new();
            for id in ids {
                let answer = site.job(&json!({"id": id, "layers": ["host"], "command": ["true"]}));
                if !answer["status"].as_u64().is_some_and(|status| (400..500).contains(&status)) {
                    through.push(format!("as a spec's id {id:?}: {answer}"));
                }
                let layer = site.job(&json!({"layers": [format!("job:{id}")], "command": ["true"]}));
                if layer["status"] == "succeeded" {
                    through.push(format!("as a layer {id:?}"));
                }
            }
            for path in [
                "/v1/jobs/..%2f..%2fx",
                "/v1/jobs/%00",
                "/v1/jobs/..%2f..%2fetc%2fpasswd/stdout",
                "/v1/jobs/x/outputs/..%2f..%2fx",
            ] {
                let answer: Value = site.served().get_json(path);
                if !answer["status"].as_u64().is_some_and(|status| (400..500).contains(&status)) {
                    through.push(format!("{path}: {answer}"));
                }
            }
            let after = hutch_tests::processes::size(&site.data()).0;
            assert!(after <= before + 4, "{after} files, {before} before");
            Outcome::of(&through, "4xx, and no path is made")
        },
    )
    .control(|| Ok("the same spec with a UUID is taken".to_owned()))
    .has_no_switch("a text that is no UUID is no id")
    .run();
}
