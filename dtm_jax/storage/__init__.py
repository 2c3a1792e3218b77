"""Files and folders that users name, local or in a bucket, and the faults of the disks behind them.

paths          makes a user's path absolute, or checks the URL of a bucket
writing        writes files and folders so that a crash leaves no half of them
local_copies   local copies of what lies in a bucket, and the cache folder
mirror         copies the files of writers that know only local paths into a bucket
object_stores  packages, endpoints and credentials of `gs://` and `s3://`
faults         turns a full disk, a quota, or missing rights into one message
"""
