//! `cow apply-delta`: a COW file from a stream.

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::{BaseOptions, CreateOptions};
use block_io::ops::inspect::{Content, inspect};
use block_io::ops::{CowWriter, OpError};
use block_io::storage::FileKind;
use block_io::{CowFormat, Host, Shown};
use cow_format::Header as CowHeader;
use cow_format::identity::{ActualIdentity, BackingIdentity, Verdict};
use nix::fcntl::OFlag;

use crate::base::BaseArgs;
use crate::delta::{Header, Reader, Record};
use crate::digest::digest_of;
use crate::error::CowError;
use crate::size::MaxSize;
use crate::ui::Ui;

/// Make a COW file from the changes in a stream
///
/// BASE must be a copy of the base that the stream was exported with. It is identified by its
/// digest, if the stream has one, or else by size and time of modification; a layer by its UUID. A
/// stream of a disk without a base needs none. NEW appears under its name only when the whole
/// stream was read and its checksums were right.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(flatten)]
    base: BaseArgs,

    /// Accept BASE without proof that its content is the same: if it is not, the disk is garbage
    #[arg(long)]
    trust: bool,

    #[command(flatten)]
    max_size: MaxSize,

    /// Replace NEW if it exists
    #[arg(long)]
    force: bool,

    /// The stream, or - for standard input
    delta: PathBuf,

    /// The new COW file
    new: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        if self.delta.as_os_str() == "-" {
            self.apply(io::stdin().lock(), Path::new("standard input"), 0, ui)?;
        } else {
            let (file, len) = self.open()?;
            self.apply(file, &self.delta, len, ui)?;
        }
        ui.note(format_args!("{}: complete", self.new.shown()));
        Ok(ExitCode::SUCCESS)
    }

    /// Opens the stream, which may be a pipe, and its length if it has one. A device is not opened:
    /// a link to one could be in a directory with the files of strangers.
    fn open(&self) -> Result<(fs::File, u64), CowError> {
        let failed = || OpError::io(&self.delta, "open");
        let mut options = fs::File::options();
        options.read(true).custom_flags(OFlag::O_PATH.bits());
        let found = options.open(&self.delta).map_err(failed())?;
        let meta = found.metadata().map_err(failed())?;
        let kind = meta.file_type();
        if !kind.is_file() && !kind.is_fifo() {
            let found = if kind.is_dir() { FileKind::Directory } else { FileKind::Other };
            return Err(OpError::NotAFile { path: self.delta.clone(), found }.into());
        }
        let path = format!("/proc/self/fd/{}", found.as_raw_fd());
        Ok((fs::File::open(path).map_err(failed())?, meta.len()))
    }

    fn apply(&self, input: impl Read, path: &Path, len: u64, ui: Ui) -> Result<(), CowError> {
        let broken = |source| CowError::Delta { path: path.to_owned(), source };
        let progress = ui.progress("apply", len);
        let input = Counted { input, count: &|bytes| progress.add(bytes) };
        let mut reader = Reader::new(input).map_err(broken)?;
        let size = reader.header().virtual_size;
        self.max_size.check(path, size)?;
        let base = self.checked_base(reader.header(), path, ui)?;
        let options = CreateOptions {
            format: CowFormat::Native,
            base,
            size: Some(size),
            replace: self.force,
            journal_len: None,
            mode: None,
        };
        let new = CowWriter::create(&Host, &self.new, &options, &[path])?;
        while let Some(record) = reader.record().map_err(broken)? {
            match record {
                Record::Data { at, bytes } => new.write(at, bytes)?,
                Record::Zero { at, len } => new.zero(at, len),
            }
        }
        Ok(new.finish()?)
    }

    /// The base, if it is the one that the stream records.
    fn checked_base(
        &self,
        header: &Header,
        delta: &Path,
        ui: Ui,
    ) -> Result<Option<BaseOptions>, CowError> {
        let (base, identity) = match (self.base.options()?, &header.base) {
            (None, None) => return Ok(None),
            (Some(base), Some(identity)) => (base, identity),
            (Some(base), None) => {
                let (delta, base) = (delta.shown(), base.path.shown());
                let why = format!(
                    "{delta}: was exported from a disk without a base, so {base} cannot be its base"
                );
                return Err(CowError::Usage(why));
            }
            (None, Some(_)) => {
                let why = format!(
                    "{}: was exported from a disk with a base; pass it with --base",
                    delta.shown()
                );
                return Err(CowError::Usage(why));
            }
        };
        let digest = header.digest;
        let options = BaseOptions { digest, ..base };
        let base = &options.path;
        let found = actual(base)?;
        let wrong =
            |why: String| CowError::OtherBase { base: base.clone(), delta: delta.to_owned(), why };
        match identity.verify(&found) {
            Ok(Verdict { doubt: None, .. }) => return Ok(Some(options)),
            Ok(Verdict { doubt: Some(doubt), .. }) if digest.is_none() => {
                ui.warn(format_args!("{}: {doubt}", base.shown()));
                return Ok(Some(options));
            }
            // The digest decides.
            Ok(_) => {}
            Err(err) => match identity {
                BackingIdentity::Layer { .. } => return Err(wrong(err.to_string())),
                BackingIdentity::ImageSeconds { size, .. }
                | BackingIdentity::Image { size, .. }
                    if *size != found.size =>
                {
                    return Err(wrong(err.to_string()));
                }
                _ => {}
            },
        }
        match digest {
            _ if self.trust => ui.warn(format_args!(
                "{}: accepted without proof that its content is the same",
                base.shown()
            )),
            Some(digest) if digest_of(base, ui)? == digest => {}
            Some(_) => return Err(wrong("its content has another digest".into())),
            None => {
                let why = "its mtime differs, and the stream has no digest to prove that the content is the same; \
                           pass --trust if you know that it is";
                return Err(wrong(why.into()));
            }
        }
        Ok(Some(options))
    }
}

/// The identity of the file at `path`.
fn actual(path: &Path) -> Result<ActualIdentity, CowError> {
    let found = inspect(&Host, path, None)?;
    let Some(top) = found.files.first() else {
        return Err(CowError::NotCow(path.to_owned()));
    };
    let layer = match &top.content {
        Content::Cow(cow) => match &cow.header {
            CowHeader::Native(native) => Some((native.uuid(), native.content_generation())),
            CowHeader::Uml(_) => None,
        },
        Content::Raw | Content::Unknown => None,
    };
    Ok(top.stat.identity(layer))
}

/// Counts the bytes that are read.
struct Counted<'a, R> {
    input: R,
    count: &'a dyn Fn(u64),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buf)?;
        (self.count)(n as u64);
        Ok(n)
    }
}
