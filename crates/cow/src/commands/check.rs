//! `cow check`: whether a COW file and the chain below it are sound.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::ops::OpError;
use block_io::ops::check::{Checked, check};
use block_io::ops::inspect::{Content, Inspection, inspect};
use block_io::{Host, ImageError, Shown};
use cow_format::HeaderError;
use cow_format::check::Severity;
use cow_format::header::BackingFormat;
use serde::Serialize;

use crate::digest::digest_of;
use crate::error::{CowError, advised};
use crate::output::{Name, OutputArgs};
use crate::ui::Ui;

/// Check a COW file and the chain below it
///
/// Checks the copies of the header, the geometry, the lengths, bits beyond the end of the disk,
/// space that no sector uses, and whether every file below exists and is the one that was recorded.
/// Exits with 0 if no error is found, 1 if the check failed (for example because the file is in
/// use), 2 if something is corrupt, 3 if space is wasted but nothing is corrupt. Repaired findings
/// do not count.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Repair what can be repaired without guessing at data
    #[arg(long)]
    repair: bool,

    /// Read the base and compare its content with the digest that the COW file has (see create
    /// --digest)
    #[arg(long)]
    base: bool,

    #[command(flatten)]
    output: OutputArgs,

    /// The COW file
    file: PathBuf,
}

/// What is printed.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    #[serde(flatten)]
    filename: Name,
    /// Findings that are left.
    corruptions: u64,
    leaks: u64,
    findings: Vec<Found>,
}

#[derive(Serialize)]
struct Found {
    #[serde(flatten)]
    filename: Name,
    severity: &'static str,
    message: String,
    repaired: bool,
}

/// Statuses, as those of qemu-img check.
const STATUS_CORRUPT: u8 = 2;
const STATUS_LEAKS: u8 = 3;

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let mut report =
            Report { filename: name(&self.file), corruptions: 0, leaks: 0, findings: Vec::new() };
        report.add_file(&self.file, self.repair)?;
        let found = inspect(&Host, &self.file, None)?;
        report.add_chain(&found)?;
        if self.base {
            report.add_digests(&found, ui)?;
        }
        self.output.print(&report, Report::to_string)?;
        Ok(match (report.corruptions, report.leaks) {
            (0, 0) => ExitCode::SUCCESS,
            (0, _) => ExitCode::from(STATUS_LEAKS),
            _ => ExitCode::from(STATUS_CORRUPT),
        })
    }
}

impl Report {
    /// Checks one COW file.
    fn add_file(&mut self, path: &Path, repair: bool) -> Result<(), CowError> {
        match check(&Host, path, repair) {
            Ok(found) => found.iter().for_each(|found| self.add(path, found)),
            // The header cannot be used or cannot be trusted.
            Err(OpError::Open(err @ ImageError::Header { .. })) if !is_no_cow(&err) => {
                self.add_problem(path, &err);
            }
            Err(err) => return Err(err.into()),
        }
        Ok(())
    }

    /// Checks the frozen layers below, and that every file is the one that was recorded.
    fn add_chain(&mut self, found: &Inspection) -> Result<(), CowError> {
        for facts in found.files.iter().skip(1) {
            if matches!(facts.content, Content::Cow(_)) {
                self.add_file(&facts.path, false)?;
            }
        }
        for facts in found.files.iter().filter(|facts| facts.merging) {
            let message = "a merge of it was interrupted; run it again: cow merge --in-place";
            self.add_note(&facts.path, message.to_owned());
        }
        // A broken header has been reported above; with data past the end, the check of the file
        // has found that.
        let seen = matches!(
            found.problem,
            Some(ImageError::Header { .. } | ImageError::Data { .. }) | None
        );
        if let (Some(problem), false) = (&found.problem, seen) {
            let last = found.files.last().map(|facts| facts.path.clone()).unwrap_or_default();
            match problem {
                // What is below it was not looked at.
                ImageError::NotAllowed { .. } => self.add_note(&last, advised(problem)),
                _ => self.add_problem(&last, problem),
            }
        }
        Ok(())
    }

    /// Compares every base with its digest.
    fn add_digests(&mut self, found: &Inspection, ui: Ui) -> Result<(), CowError> {
        for facts in &found.files {
            let Some(backing) = facts.backing.as_ref().filter(|backing| backing.found.is_some())
            else {
                continue;
            };
            let base = backing.path.shown();
            let (severity, message) = match backing.digest {
                _ if backing.format == BackingFormat::Native => continue,
                None => ("note", format!("there is no digest to compare {base} with")),
                Some(stored) if digest_of(&backing.path, ui)? == stored => {
                    ("note", format!("the content of {base} matches the digest"))
                }
                Some(_) => {
                    self.corruptions += 1;
                    ("corruption", format!("the content of {base} does not match the digest"))
                }
            };
            let filename = name(&facts.path);
            self.findings.push(Found { filename, severity, message, repaired: false });
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, found: &Checked) {
        let severity = match found.finding.severity() {
            Severity::Note => "note",
            Severity::Leak => "leak",
            Severity::Corrupt => "corruption",
        };
        match found.finding.severity() {
            _ if found.repaired => {}
            Severity::Note => {}
            Severity::Leak => self.leaks += 1,
            Severity::Corrupt => self.corruptions += 1,
        }
        let message = found.finding.to_string();
        let filename = name(path);
        self.findings.push(Found { filename, severity, message, repaired: found.repaired });
    }

    fn add_note(&mut self, path: &Path, message: String) {
        let filename = name(path);
        self.findings.push(Found { filename, severity: "note", message, repaired: false });
    }

    fn add_problem(&mut self, path: &Path, problem: &ImageError) {
        self.corruptions += 1;
        self.findings.push(Found {
            filename: name(path),
            severity: "corruption",
            message: advised(problem),
            repaired: false,
        });
    }
}

fn name(path: &Path) -> Name {
    Name::new("filename", path)
}

/// For example a raw image: there is nothing to check.
fn is_no_cow(err: &ImageError) -> bool {
    matches!(err, ImageError::Header { source: HeaderError::NotCow { .. }, .. })
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for found in &self.findings {
            let repaired = if found.repaired { " (repaired)" } else { "" };
            let Found { filename, severity, message, .. } = found;
            match message.starts_with(&filename.to_string()) {
                true => writeln!(f, "{severity}: {message}{repaired}")?,
                false => writeln!(f, "{severity}: {filename}: {message}{repaired}")?,
            }
        }
        match (self.corruptions, self.leaks) {
            (0, 0) => writeln!(f, "{}: no errors", self.filename),
            (corruptions, leaks) => {
                writeln!(f, "{}: {corruptions} corruptions, {leaks} leaks", self.filename)
            }
        }
    }
}
