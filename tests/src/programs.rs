//! The programs that tests run: this project's own, built once, and others by name.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::process::Process;

/// How long a program that does no guest's work may take.
const RUN_TIMEOUT: Duration = Duration::from_secs(120);

/// What a program that has ended left.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; None if a signal ended it.
    pub code: Option<i32>,
    /// stdout and stderr.
    pub output: String,
}

/// Runs `command` to its end.
pub fn run(command: Command) -> Outcome {
    let name = command.get_program().to_string_lossy().into_owned();
    let (status, output) = Process::spawn(&name, command).wait(RUN_TIMEOUT);
    Outcome { code: status.code(), output }
}

/// Runs `command`, which must exit with 0, and returns its output.
pub fn run_ok(command: Command) -> String {
    let line = format!("{command:?}");
    let outcome = run(command);
    assert_eq!(outcome.code, Some(0), "{line} failed: {}", outcome.output);
    outcome.output
}

/// Ok if every program is in PATH, else what is missing.
pub fn available(programs: &[&str]) -> Result<(), String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = |name: &&&str| env::split_paths(&path).any(|dir| dir.join(name).is_file());
    match programs.iter().find(|name| !found(name)) {
        None => Ok(()),
        Some(name) => Err(format!("{name} is not in PATH (ci/setup installs it)")),
    }
}

/// Compiles a C program or library; `options` are the compiler's.
pub fn compile_c(source: &str, options: &[&str], out: &Path) {
    let mut file = out.as_os_str().to_owned();
    file.push(".c");
    fs::write(&file, source).expect("writing a C file");
    let mut cc = Command::new("cc");
    cc.args(options).arg("-o").arg(out).arg(file);
    run_ok(cc);
}

/// The daemon of this workspace.
pub fn vhost_user_blk() -> Command {
    Command::new(bin_dir().join("vhost-user-blk"))
}

/// The tool `cow` of this workspace.
pub fn cow() -> Command {
    Command::new(bin_dir().join("cow"))
}

/// The load generator of this workspace.
pub fn blk_bench() -> Command {
    Command::new(bin_dir().join("blk-bench"))
}

/// Where the workspace's programs are: BIN_DIR, else the directory of this test's own profile after
/// one `cargo build` there, so that a test never meets an old program.
fn bin_dir() -> &'static PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        if let Some(dir) = env::var_os("BIN_DIR") {
            return PathBuf::from(dir);
        }
        let test = env::current_exe().expect("the path of the test program");
        // TARGET/PROFILE/deps/TEST
        let profile_dir = test.ancestors().nth(2).expect("a test is in target/PROFILE/deps");
        let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        build.args(["build", "--quiet", "--workspace", "--bins", "--target-dir"]);
        build.arg(profile_dir.parent().expect("a profile's directory has a parent"));
        if profile_dir.ends_with("release") {
            build.arg("--release");
        }
        let status = build.status().expect("cargo can be run");
        assert!(status.success(), "building the workspace's programs failed");
        profile_dir.to_owned()
    })
}
