//! `cow info`: what a file is, and whether its base is the recorded one.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::ops::inspect::{BackingFacts, Content, CowFacts, FileFacts, inspect};
use block_io::ops::signature::{Signature, signature_of};
use block_io::{Host, Shown};
use cow_format::header::{NativeState, UmlVersion};
use cow_format::identity::{BackingIdentity, Timestamp};
use cow_format::{Header, SECTOR_SIZE};
use serde::Serialize;

use crate::error::{CowError, advised, advised_doubt};
use crate::output::{Name, OutputArgs, hex};
use crate::size::Human;
use crate::source::qcow2::header_of;
use crate::source::qcow2_header::{DataFile, Qcow2Header};
use crate::ui::Ui;

/// Print what a file is and whether its base matches
///
/// Changes nothing and can be used while a virtual machine runs. If the file or its chain has a
/// problem, everything that can be determined is printed together with the problem. Exits with 1 if
/// the file's own header cannot be used.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The base image, instead of the path that FILE names
    #[arg(short, long, value_name = "BASE")]
    base: Option<PathBuf>,

    /// Print every file that the disk consists of, the top first
    #[arg(long, visible_alias = "backing-chain")]
    chain: bool,

    #[command(flatten)]
    output: OutputArgs,

    /// A COW file or an image; a file without a COW header is treated as a raw image
    file: PathBuf,
}

impl Args {
    pub fn run(self, _ui: Ui) -> Result<ExitCode, CowError> {
        let found = inspect(&Host, &self.file, self.base.as_deref())?;
        let mut files: Vec<_> = found.files.iter().map(Facts::new).collect();
        // A problem further down does not affect the files above it, but the disk cannot be opened.
        if let (Some(problem), Some(top)) = (&found.problem, files.first_mut()) {
            top.problem = Some(advised(problem));
        }
        if let Some(top) = files.first_mut().filter(|top| top.format == Some("raw"))
            && signature_of(&Host, &self.file) == Some(Signature::Qcow2)
        {
            top.looks_like = Some("qcow2");
            top.qcow2 = Some(Qcow2Part::new(header_of(&self.file)));
        }
        match self.chain {
            true => self.output.print(&files, |files| text(files))?,
            false => {
                files.truncate(1);
                if let Some(top) = files.first() {
                    self.output.print(top, |top| text(std::slice::from_ref(top)))?;
                }
            }
        }
        let unknown = found.files.first().is_none_or(|top| matches!(top.content, Content::Unknown));
        Ok(if unknown { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

/// The printed facts of a file. Names as in qemu-img, if it has them; all sizes in bytes.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Facts {
    #[serde(flatten)]
    filename: Name,
    /// `uml`, `native`, `raw`, or nothing if the header cannot be used.
    format: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_version: Option<String>,
    virtual_size: Option<u64>,
    file_length: u64,
    actual_size: u64,
    in_use: bool,
    #[serde(flatten)]
    cow: Option<CowPart>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<Backing>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    /// What a raw image could be instead, by its first bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    looks_like: Option<&'static str>,
    /// What its header says in that case. Nothing that it names has been opened.
    #[serde(skip_serializing_if = "Option::is_none")]
    qcow2: Option<Qcow2Part>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Part {
    #[serde(skip_serializing_if = "Option::is_none")]
    virtual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypted: Option<bool>,
    #[serde(flatten)]
    backing: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    #[serde(flatten)]
    data_file: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl Qcow2Part {
    fn new(header: Result<Qcow2Header, CowError>) -> Self {
        let (header, problem) = match header {
            Ok(header) => (Some(header), None),
            Err(err) => (None, Some(err.to_string())),
        };
        let backing = header.as_ref().and_then(|header| header.backing.as_ref());
        let data_file = header.as_ref().and_then(|header| header.data_file.as_ref());
        Qcow2Part {
            virtual_size: header.as_ref().map(|header| header.virtual_size),
            encrypted: header.as_ref().map(|header| header.encrypted),
            backing: backing.map(|backing| Name::new("backing-filename", &backing.name)),
            backing_filename_format: backing.and_then(|backing| backing.format.clone()),
            data_file: data_file
                .map(|DataFile(name)| Name::new("data-file", name.clone().unwrap_or_default())),
            problem,
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct CowPart {
    present_sectors: u64,
    sectors: u64,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    virtual_size_max: Option<u64>,
    interrupted_merge: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Backing {
    #[serde(flatten)]
    filename: Name,
    #[serde(flatten)]
    full_filename: Name,
    format: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    stored: Identity,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual: Option<Identity>,
    matches: bool,
    /// Why a match proves less than it should.
    #[serde(skip_serializing_if = "Option::is_none")]
    warning: Option<String>,
}

/// How a backing file is identified: an image by size and mtime, a layer by UUID and generation.
#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Identity {
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mtime: Option<Mtime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_generation: Option<u64>,
}

/// A time; UML knows whole seconds only.
#[derive(Clone, Copy, Serialize)]
struct Mtime {
    seconds: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    nanoseconds: Option<u32>,
}

impl Facts {
    fn new(facts: &FileFacts) -> Self {
        let cow = match &facts.content {
            Content::Cow(cow) => Some(cow),
            Content::Raw | Content::Unknown => None,
        };
        let (format, format_version) = match (&facts.content, cow.map(|cow| &cow.header)) {
            (Content::Unknown, _) => (None, None),
            (_, Some(Header::Uml(uml))) => (Some("uml"), Some(uml_version(uml.version()))),
            (_, Some(Header::Native(_))) => (Some("native"), Some("1".to_owned())),
            (_, None) => (Some("raw"), None),
        };
        Facts {
            filename: Name::new("filename", &facts.path),
            format,
            format_version,
            virtual_size: match &facts.content {
                Content::Cow(cow) => Some(cow.header.geometry().virtual_size()),
                Content::Raw => Some(facts.stat.size),
                Content::Unknown => None,
            },
            file_length: facts.stat.size,
            actual_size: facts.stat.allocated,
            in_use: facts.in_use,
            cow: cow.map(|cow| CowPart::new(facts, cow)),
            backing: facts.backing.as_ref().map(Backing::new),
            problem: None,
            looks_like: None,
            qcow2: None,
        }
    }
}

impl CowPart {
    fn new(facts: &FileFacts, cow: &CowFacts) -> Self {
        let open = if facts.in_use { "in use" } else { "not closed" };
        let (state, native) = match &cow.header {
            Header::Uml(_) => (if facts.in_use || cow.live { open } else { "clean" }, None),
            Header::Native(native) => match native.state() {
                NativeState::Clean => ("clean", Some(native)),
                NativeState::InUse { .. } => (open, Some(native)),
                NativeState::Frozen => ("frozen", Some(native)),
            },
        };
        CowPart {
            present_sectors: cow.present.get(),
            sectors: cow.header.geometry().sectors().get(),
            state,
            uuid: native.map(|native| native.uuid().to_string()),
            content_generation: native.map(|native| native.content_generation()),
            virtual_size_max: native.map(|native| native.virtual_size_max()),
            interrupted_merge: facts.merging,
        }
    }
}

impl Backing {
    fn new(backing: &BackingFacts) -> Self {
        let layer = matches!(backing.identity, BackingIdentity::Layer { .. });
        let seconds_only = matches!(backing.identity, BackingIdentity::ImageSeconds { .. });
        let actual = backing.found.map(|found| match found.layer {
            Some((uuid, generation)) if layer => Identity::layer(uuid.to_string(), generation),
            _ => Identity::image(found.size, mtime(found.mtime, seconds_only)),
        });
        let mut told = Backing {
            filename: Name::new("filename", &backing.stored),
            full_filename: Name::new("full-filename", &backing.path),
            format: backing.format.to_string(),
            digest: backing.digest.map(|digest| format!("blake3:{}", hex(&digest))),
            stored: match backing.identity {
                BackingIdentity::ImageSeconds { size, mtime_secs } => {
                    Identity::image(size, Mtime { seconds: mtime_secs.into(), nanoseconds: None })
                }
                BackingIdentity::Image { size, mtime: time, .. } => {
                    Identity::image(size, mtime(time, false))
                }
                BackingIdentity::Layer { uuid, content_generation } => {
                    Identity::layer(uuid.to_string(), content_generation)
                }
            },
            actual,
            matches: matches!(backing.verdict, Some(Ok(()))),
            warning: backing.doubt.as_ref().map(advised_doubt),
        };
        if backing.found.is_some_and(|found| found.device) {
            // The mtime of the device node, which is never compared.
            for identity in [Some(&mut told.stored), told.actual.as_mut()].into_iter().flatten() {
                identity.mtime = None;
            }
        }
        told
    }
}

impl Identity {
    fn image(size: u64, mtime: Mtime) -> Self {
        Identity { size: Some(size), mtime: Some(mtime), ..Identity::default() }
    }

    fn layer(uuid: String, generation: u64) -> Self {
        Identity { uuid: Some(uuid), content_generation: Some(generation), ..Identity::default() }
    }
}

fn mtime(time: Timestamp, seconds_only: bool) -> Mtime {
    Mtime { seconds: time.secs(), nanoseconds: (!seconds_only).then(|| time.nanos()) }
}

fn uml_version(version: UmlVersion) -> String {
    let padded = if version == UmlVersion::V3Padded { ", padded" } else { "" };
    format!("{}{padded}", version.number())
}

fn text(files: &[Facts]) -> String {
    files.iter().map(Facts::to_string).collect::<Vec<_>>().join("\n")
}

impl std::fmt::Display for Facts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "image: {}", self.filename)?;
        match (self.format, &self.format_version) {
            (Some(format), Some(version)) => {
                writeln!(f, "file format: {format} (version {version})")?
            }
            (Some(format), None) => writeln!(f, "file format: {format}")?,
            (None, _) => writeln!(f, "file format: unknown")?,
        }
        if let Some(size) = self.virtual_size {
            writeln!(f, "virtual size: {}", Bytes(size))?;
        }
        writeln!(f, "file length: {}", Bytes(self.file_length))?;
        writeln!(f, "disk size: {}", Bytes(self.actual_size))?;
        if let Some(cow) = &self.cow {
            write!(f, "{cow}")?;
        } else if self.in_use {
            writeln!(f, "state: in use")?;
        }
        if let Some(backing) = &self.backing {
            write!(f, "{backing}")?;
        }
        if let Some(problem) = &self.problem {
            writeln!(f, "problem: {problem}")?;
        }
        if let Some(format) = self.looks_like {
            writeln!(
                f,
                "begins like: {format} (if it is one: cow convert -f {format} makes another of it)"
            )?;
        }
        self.qcow2.as_ref().map_or(Ok(()), |qcow2| write!(f, "{qcow2}"))
    }
}

impl std::fmt::Display for Qcow2Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(size) = self.virtual_size {
            writeln!(f, "its virtual size: {}", Bytes(size))?;
        }
        if self.encrypted == Some(true) {
            writeln!(f, "its data: encrypted")?;
        }
        if let Some(backing) = &self.backing {
            writeln!(f, "its backing file, not opened: {backing}")?;
        }
        if let Some(format) = &self.backing_filename_format {
            writeln!(f, "its backing format: {}", Path::new(format).shown())?;
        }
        if let Some(data_file) = &self.data_file {
            writeln!(f, "its data file, not opened: {data_file}")?;
        }
        self.problem.as_ref().map_or(Ok(()), |problem| writeln!(f, "its problem: {problem}"))
    }
}

impl std::fmt::Display for CowPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = Human(self.present_sectors * SECTOR_SIZE);
        writeln!(f, "present: {} of {} sectors ({bytes})", self.present_sectors, self.sectors)?;
        writeln!(f, "state: {}", self.state)?;
        if let Some(uuid) = &self.uuid {
            writeln!(
                f,
                "uuid: {uuid}, content generation {}",
                self.content_generation.unwrap_or(0)
            )?;
        }
        if self.interrupted_merge {
            writeln!(f, "merge: interrupted; run it again: cow merge --in-place")?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "backing file: {}", self.filename)?;
        if self.filename.path != self.full_filename.path {
            write!(f, " (at {})", self.full_filename)?;
        }
        writeln!(f, "\nbacking format: {}", self.format)?;
        let (stored, actual) = (&self.stored, self.actual.as_ref());
        let size = |identity: &Identity| identity.size.map(|size| Bytes(size).to_string());
        compare(f, "size", size(stored), actual.map(size))?;
        let mtime = |identity: &Identity| identity.mtime.map(|mtime| mtime.to_string());
        compare(f, "mtime", mtime(stored), actual.map(mtime))?;
        compare(f, "uuid", stored.uuid.clone(), actual.map(|actual| actual.uuid.clone()))?;
        let generation = |identity: &Identity| identity.content_generation.map(|n| n.to_string());
        compare(f, "generation", generation(stored), actual.map(generation))?;
        if let Some(digest) = &self.digest {
            writeln!(f, "backing digest: {digest}")?;
        }
        writeln!(f, "backing file matches: {}", if self.matches { "yes" } else { "NO" })?;
        match &self.warning {
            Some(warning) => writeln!(f, "backing warning: {warning}"),
            None => Ok(()),
        }
    }
}

/// A line on one property of the backing file, if the header has it: once if both agree, else both.
fn compare(
    f: &mut std::fmt::Formatter<'_>,
    what: &str,
    stored: Option<String>,
    actual: Option<Option<String>>,
) -> std::fmt::Result {
    let Some(stored) = stored else { return Ok(()) };
    match actual.map(|actual| actual.unwrap_or_else(|| "none".to_owned())) {
        None => writeln!(f, "backing {what}: {stored} in the header, nothing to compare it with"),
        Some(actual) if actual == stored => writeln!(f, "backing {what}: {stored}"),
        Some(actual) => writeln!(f, "backing {what}: {stored} in the header, {actual} found"),
    }
}

impl std::fmt::Display for Mtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match Timestamp::new(self.seconds, self.nanoseconds.unwrap_or(0)) {
            Some(time) => write!(f, "{time}"),
            None => write!(f, "{}", self.seconds),
        }
    }
}

/// `1 MiB (1048576 bytes)`.
struct Bytes(u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes)", Human(self.0), self.0)
    }
}
