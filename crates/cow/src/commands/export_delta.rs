//! `cow export-delta`: the content of a COW file as a stream.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::ops::inspect::{BackingFacts, inspect};
use block_io::ops::{Holes, OpError, Output, threads};
use block_io::storage::Storage;
use block_io::{Disk, DiskOptions, Host, Shown};
use cow_format::{ByteOffset, Extent, SECTOR_SIZE};

use crate::delta::{Header, RECORD_MAX, Record, Writer};
use crate::dependents::id_of;
use crate::error::CowError;
use crate::steps::steps;
use crate::ui::Ui;

/// Write the changes of a COW file as a stream
///
/// The stream has exactly the sectors that COW holds itself (or those since the file of its chain
/// that --since names), with checksums, and compressed (zstd). On a host with a copy of the base,
/// apply-delta makes the same COW file from it. Use it to ship a disk to a host that has the base
/// already, and for incremental backups: take a snapshot, then export the layer that it froze.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Export all changes since this file of the chain, not only those in COW itself
    #[arg(long, value_name = "FILE")]
    since: Option<PathBuf>,

    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,

    /// The COW file
    cow: PathBuf,

    /// The new file, or - for standard output
    out: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let disk = Disk::open_cow(&self.cow, None, &options)?;
        let (depth, base) = self.base(&disk)?;
        let header = Header {
            virtual_size: disk.size(),
            base: base.as_ref().map(|base| base.identity),
            digest: base.as_ref().and_then(|base| base.digest),
        };
        let export = Export { disk: &disk, depth, ui };
        if self.out.as_os_str() == "-" {
            let out = export.run(io::stdout().lock(), Path::new("standard output"), &header)?;
            drop(out);
            return Ok(ExitCode::SUCCESS);
        }
        let inputs: Vec<_> = disk.layers().iter().map(|layer| layer.path()).collect();
        let output = Output::create(&Host, &self.out, self.force, &inputs)?;
        let file = output.file().as_fd().try_clone_to_owned();
        let file = file.map_err(OpError::io(&self.out, "write"))?;
        export.run(std::fs::File::from(file), &self.out, &header)?;
        output.place()?;
        ui.note(format_args!("{}: complete", self.out.shown()));
        Ok(ExitCode::SUCCESS)
    }

    /// How many files from the top on are exported, and the last one's reference to the next.
    fn base(&self, disk: &Disk) -> Result<(usize, Option<BackingFacts>), CowError> {
        let mut files = inspect(&Host, &self.cow, None)?.files;
        let depth = match &self.since {
            None => 1,
            Some(since) => {
                let not_below =
                    || CowError::NotBelow { file: since.clone(), cow: self.cow.clone() };
                let id = id_of(since).ok_or_else(not_below)?;
                let place = files.iter().position(|file| file.stat.id == id);
                place.filter(|place| *place > 0).ok_or_else(not_below)?
            }
        };
        // The disk has been opened, so the chain is all there.
        let last = files.get_mut(depth.min(disk.layers().len()) - 1);
        Ok((depth, last.and_then(|file| file.backing.take())))
    }
}

struct Export<'a> {
    disk: &'a Disk,
    /// Files whose content is exported, from the top on.
    depth: usize,
    ui: Ui,
}

impl Export<'_> {
    fn run<W: Write>(&self, out: W, path: &Path, header: &Header) -> Result<W, CowError> {
        let failed = || OpError::io(path, "write");
        // One thread compresses for each core, beside the one that reads.
        let workers = u32::try_from(threads().get()).unwrap_or(1);
        let mut writer = Writer::new(out, header, workers).map_err(failed())?;
        let progress = self.ui.progress("export", self.disk.size());
        let mut holes = vec![Holes::default(); self.depth];
        let mut buf = vec![0; RECORD_MAX];
        for range in steps(self.disk.capacity()) {
            let mut at = range.start_bytes().get();
            for extent in self.disk.extents(range)? {
                let (Extent::Data { len, .. } | Extent::Zero { len }) = extent;
                match extent {
                    Extent::Data { layer, at: place, .. } if layer.get() < self.depth => {
                        let source = (layer.get(), place.get());
                        self.data(source, at, len, (&mut holes, &mut buf), &mut |record| {
                            writer.record(record).map_err(failed())
                        })?;
                    }
                    // If files are left out, zeros can hide data further down.
                    Extent::Zero { .. } if self.depth > 1 && at.is_multiple_of(SECTOR_SIZE) => {
                        let len = len.next_multiple_of(SECTOR_SIZE);
                        writer.record(&Record::Zero { at, len }).map_err(failed())?;
                    }
                    Extent::Data { .. } | Extent::Zero { .. } => {}
                }
                at += len;
                progress.add(len);
            }
        }
        Ok(writer.finish().map_err(failed())?)
    }

    /// Makes records of `len` bytes of a file.
    fn data(
        &self,
        (layer, place): (usize, u64),
        at: u64,
        len: u64,
        (holes, buf): (&mut [Holes], &mut [u8]),
        put: &mut dyn FnMut(&Record<'_>) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        let file = &self.disk.layers()[layer];
        let mut done = 0;
        while done < len {
            let (at, from) = (at + done, place + done);
            let stretch = holes[layer].stretch(file.file(), from, len - done);
            let (part, hole) = stretch.map_err(OpError::read(file.path(), from))?;
            let whole = part / SECTOR_SIZE * SECTOR_SIZE;
            if hole && whole > 0 {
                put(&Record::Zero { at, len: whole })?;
                done += whole;
                continue;
            }
            // Whole sectors: where the file ends within one, zeros fill it.
            let record = part.next_multiple_of(SECTOR_SIZE).min(RECORD_MAX as u64);
            let inside = record.min(len - done);
            let (record, n) = (to_usize(record), to_usize(inside));
            let read = file.file().read_zero_filled(&mut buf[..n], ByteOffset::new(from));
            read.map_err(OpError::read(file.path(), from))?;
            buf[n..record].fill(0);
            put(&Record::Data { at, bytes: &buf[..record] })?;
            done += inside;
        }
        Ok(())
    }
}

/// A length of at most [`RECORD_MAX`].
fn to_usize(len: u64) -> usize {
    usize::try_from(len).unwrap_or(RECORD_MAX)
}
