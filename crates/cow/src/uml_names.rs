//! `uml_mkcow` and `uml_moo`: under these names (a link will do) the tool takes their command
//! lines.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Parser;

/// `uml_mkcow [-f] COW BASE`.
#[derive(Parser, Debug)]
#[command(name = "uml_mkcow", about = "Makes a COW file of User Mode Linux over a base image")]
struct Mkcow {
    /// Replace COW if it exists
    #[arg(short)]
    force: bool,
    /// The new COW file
    cow: PathBuf,
    /// The base image
    base: PathBuf,
}

/// `uml_moo [-b BASE] [-d] COW [OUT]`.
#[derive(Parser, Debug)]
#[command(name = "uml_moo", about = "Merges a COW file and its base image")]
struct Moo {
    /// The base image, instead of the path in the COW file
    #[arg(short = 'b', value_name = "BASE")]
    base: Option<PathBuf>,
    /// Merge into the base image itself: it is overwritten
    #[arg(short = 'd', conflicts_with = "out")]
    in_place: bool,
    /// Let the header of COW name a base in DIR; may be repeated
    #[arg(long, value_name = "DIR")]
    backing_dir: Vec<PathBuf>,
    /// The COW file
    cow: PathBuf,
    /// The new image
    #[arg(required_unless_present = "in_place")]
    out: Option<PathBuf>,
}

/// Translates the command lines of these programs to one of `cow`; under any other name `args` stay
/// as they are.
pub fn translate(args: Vec<OsString>) -> Result<Vec<OsString>, clap::Error> {
    let name = args.first().and_then(|program| Path::new(program).file_name()?.to_str());
    match name {
        Some("uml_mkcow") => Mkcow::try_parse_from(&args).map(|args| args.translate()),
        Some("uml_moo") => Moo::try_parse_from(&args).map(|args| args.translate()),
        _ => Ok(args),
    }
}

impl Mkcow {
    fn translate(self) -> Vec<OsString> {
        let mut args = words(&["cow", "create", "--format=uml", "--base-format=raw"]);
        args.extend(self.force.then(|| "--force".into()));
        args.extend(["--base".into(), self.base.into(), "--".into(), self.cow.into()]);
        args
    }
}

impl Moo {
    /// They replace an output that exists without being asked.
    fn translate(self) -> Vec<OsString> {
        let mut args = words(&["cow", "merge"]);
        args.extend(words(if self.in_place { &["--in-place", "--yes"] } else { &["--force"] }));
        for dir in self.backing_dir {
            args.extend(["--backing-dir".into(), dir.into()]);
        }
        if let Some(base) = self.base {
            args.extend(["--base".into(), base.into()]);
        }
        args.extend(["--".into(), self.cow.into()]);
        args.extend(self.out.map(OsString::from));
        args
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}
