"""How the stand-in GitHub's things look in JSON; tests check it against GitHub's OpenAPI and schemas."""

import base64
import time
from datetime import UTC, datetime
from typing import Any

from tests.standins.github_model import Job, Repository, Run, Runner

Json = dict[str, Any]

_USER_LINKS = {
    "followers_url": "/followers",
    "following_url": "/following{/other_user}",
    "gists_url": "/gists{/gist_id}",
    "starred_url": "/starred{/owner}{/repo}",
    "subscriptions_url": "/subscriptions",
    "organizations_url": "/orgs",
    "repos_url": "/repos",
    "events_url": "/events{/privacy}",
    "received_events_url": "/received_events",
}

_REPO_LINKS = {
    "archive_url": "/{archive_format}{/ref}",
    "assignees_url": "/assignees{/user}",
    "blobs_url": "/git/blobs{/sha}",
    "branches_url": "/branches{/branch}",
    "collaborators_url": "/collaborators{/collaborator}",
    "comments_url": "/comments{/number}",
    "commits_url": "/commits{/sha}",
    "compare_url": "/compare/{base}...{head}",
    "contents_url": "/contents/{+path}",
    "contributors_url": "/contributors",
    "deployments_url": "/deployments",
    "downloads_url": "/downloads",
    "events_url": "/events",
    "forks_url": "/forks",
    "git_commits_url": "/git/commits{/sha}",
    "git_refs_url": "/git/refs{/sha}",
    "git_tags_url": "/git/tags{/sha}",
    "hooks_url": "/hooks",
    "issue_comment_url": "/issues/comments{/number}",
    "issue_events_url": "/issues/events{/number}",
    "issues_url": "/issues{/number}",
    "keys_url": "/keys{/key_id}",
    "labels_url": "/labels{/name}",
    "languages_url": "/languages",
    "merges_url": "/merges",
    "milestones_url": "/milestones{/number}",
    "notifications_url": "/notifications{?since,all,participating}",
    "pulls_url": "/pulls{/number}",
    "releases_url": "/releases{/id}",
    "stargazers_url": "/stargazers",
    "statuses_url": "/statuses/{sha}",
    "subscribers_url": "/subscribers",
    "subscription_url": "/subscription",
    "tags_url": "/tags",
    "teams_url": "/teams",
    "trees_url": "/git/trees{/sha}",
}

_CREATED = "2026-01-01T00:00:00Z"


def iso(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def node(kind: str, number: int) -> str:
    return base64.b64encode(f"0:{kind}{number}".encode()).decode()


class Shapes:
    """``api`` is the REST address, ``web`` the address people and git use; no slash at the end."""

    def __init__(self, api: str, web: str) -> None:
        self.api = api
        self.web = web

    def user(self, login: str, *, organization: bool = False) -> Json:
        url = f"{self.api}/users/{login}"
        return {
            "login": login,
            "id": sum(login.encode()),
            "node_id": node("User", sum(login.encode())),
            "avatar_url": f"{self.web}/{login}.png",
            "gravatar_id": "",
            "url": url,
            "html_url": f"{self.web}/{login}",
            **{key: url + tail for key, tail in _USER_LINKS.items()},
            "type": "Organization" if organization else "User",
            "site_admin": False,
        }

    def organization(self, login: str) -> Json:
        url = f"{self.api}/orgs/{login}"
        links = {"repos": "/repos", "events": "/events", "hooks": "/hooks", "issues": "/issues"}
        return {
            "login": login,
            "id": sum(login.encode()),
            "node_id": node("Organization", sum(login.encode())),
            "url": url,
            **{f"{key}_url": url + tail for key, tail in links.items()},
            "members_url": url + "/members{/member}",
            "public_members_url": url + "/public_members{/member}",
            "avatar_url": f"{self.web}/{login}.png",
            "description": None,
        }

    def repo_url(self, repository: Repository) -> str:
        return f"{self.api}/repos/{repository.full_name}"

    def minimal_repository(self, repository: Repository) -> Json:
        url = self.repo_url(repository)
        return {
            "id": repository.id,
            "node_id": node("Repository", repository.id),
            "name": repository.name,
            "full_name": repository.full_name,
            "private": repository.private,
            "owner": self.user(repository.owner, organization=repository.organization),
            "html_url": f"{self.web}/{repository.full_name}",
            "description": None,
            "fork": False,
            "url": url,
            **{key: url + tail for key, tail in _REPO_LINKS.items()},
        }

    def repository(self, repository: Repository) -> Json:
        """The full shape that webhooks carry."""
        web = f"{self.web}/{repository.full_name}"
        return {
            **self.minimal_repository(repository),
            "created_at": _CREATED,
            "updated_at": _CREATED,
            "pushed_at": _CREATED,
            "git_url": f"git://{web.partition('://')[2]}.git",
            "ssh_url": f"git@{web.partition('://')[2]}.git",
            "clone_url": f"{web}.git",
            "svn_url": web,
            "homepage": None,
            "size": 1,
            "stargazers_count": 0,
            "watchers_count": 0,
            "language": "Python",
            "has_issues": True,
            "has_projects": True,
            "has_downloads": True,
            "has_wiki": True,
            "has_pages": False,
            "has_discussions": False,
            "forks_count": 0,
            "mirror_url": None,
            "archived": False,
            "disabled": False,
            "open_issues_count": 0,
            "license": None,
            "allow_forking": True,
            "is_template": False,
            "web_commit_signoff_required": False,
            "topics": [],
            "visibility": "private" if repository.private else "public",
            "forks": 0,
            "open_issues": 0,
            "watchers": 0,
            "default_branch": repository.default_branch,
            "custom_properties": {},
        }

    def runner(self, runner: Runner) -> Json:
        return {
            "id": runner.id,
            "name": runner.name,
            "os": "linux" if runner.version else "unknown",
            "status": "online" if runner.online else "offline",
            "busy": runner.busy,
            "ephemeral": True,
            "runner_group_id": 1,
            "labels": [
                {"id": number, "name": label, "type": "custom"}
                for number, label in enumerate(runner.labels, 1)
            ],
            **({"version": runner.version} if runner.version else {}),
        }

    def job(self, job: Job) -> Json:
        run = job.run
        url = f"{self.repo_url(run.repository)}/actions"
        return {
            "id": job.id,
            "run_id": run.id,
            "workflow_name": run.workflow_name,
            "head_branch": run.branch,
            "run_url": f"{url}/runs/{run.id}",
            "run_attempt": job.attempt,
            "node_id": node("CheckRun", job.id),
            "head_sha": run.sha,
            "url": f"{url}/jobs/{job.id}",
            "html_url": f"{self.web}/{run.repository.full_name}/actions/runs/{run.id}/job/{job.id}",
            "status": job.status,
            "conclusion": job.conclusion,
            "created_at": iso(job.created_at),
            "started_at": iso(job.started_at or job.created_at),
            "completed_at": iso(job.completed_at),
            "name": job.name,
            "steps": [dict(step) for step in job.steps],
            "check_run_url": f"{self.repo_url(run.repository)}/check-runs/{job.id}",
            "labels": list(job.labels),
            "runner_id": job.runner_id,
            "runner_name": job.runner_name,
            "runner_group_id": None if job.runner_id is None else 1,
            "runner_group_name": None if job.runner_id is None else "Default",
        }

    def run(self, run: Run) -> Json:
        url = f"{self.repo_url(run.repository)}/actions/runs/{run.id}"
        suite = f"{self.repo_url(run.repository)}/check-suites/{run.id}"
        small = self.minimal_repository(run.repository)
        actor = self.user("octocat")
        return {
            "id": run.id,
            "name": run.workflow_name,
            "node_id": node("WorkflowRun", run.id),
            "head_branch": run.branch,
            "head_sha": run.sha,
            "path": run.workflow_path,
            "display_title": run.commit["message"].partition("\n")[0],
            "run_number": run.number,
            "event": run.event,
            "status": run.status,
            "conclusion": run.conclusion,
            "workflow_id": 1,
            "check_suite_id": run.id,
            "check_suite_node_id": node("CheckSuite", run.id),
            "url": url,
            "html_url": f"{self.web}/{run.repository.full_name}/actions/runs/{run.id}",
            "pull_requests": [],
            "created_at": iso(run.created_at),
            "updated_at": iso(run.created_at),
            "actor": actor,
            "run_attempt": run.attempt,
            "referenced_workflows": [],
            "run_started_at": iso(run.created_at),
            "triggering_actor": actor,
            "jobs_url": f"{url}/jobs",
            "logs_url": f"{url}/logs",
            "check_suite_url": suite,
            "artifacts_url": f"{url}/artifacts",
            "cancel_url": f"{url}/cancel",
            "rerun_url": f"{url}/rerun",
            "previous_attempt_url": f"{url}/attempts/{run.attempt - 1}" if run.attempt > 1 else None,
            "workflow_url": f"{self.repo_url(run.repository)}/actions/workflows/1",
            "head_commit": run.commit,
            "repository": small,
            "head_repository": small,
        }

    def deployment(self, job: Job) -> Json:
        url = f"{self.repo_url(job.run.repository)}/deployments/{job.id}"
        return {
            "url": url,
            "id": job.id,
            "node_id": node("Deployment", job.id),
            "sha": job.run.sha,
            "ref": job.run.branch,
            "task": "deploy",
            "payload": {},
            "original_environment": job.environment,
            "environment": job.environment,
            "description": None,
            "creator": self.user("octocat"),
            "created_at": iso(job.created_at),
            "updated_at": iso(job.created_at),
            "statuses_url": f"{url}/statuses",
            "repository_url": self.repo_url(job.run.repository),
        }

    def workflow_job_event(self, job: Job, action: str, installation_id: int | None) -> Json:
        repository = job.run.repository
        event: Json = {
            "action": action,
            "workflow_job": self.job(job),
            "repository": self.repository(repository),
            "sender": self.user("octocat"),
        }
        if repository.organization:
            event["organization"] = self.organization(repository.owner)
        if job.environment:
            event["deployment"] = self.deployment(job)
        if installation_id is not None:
            event["installation"] = {"id": installation_id, "node_id": node("Installation", installation_id)}
        return event

    def push_event(
        self,
        repository: Repository,
        ref: str,
        before: str,
        after: str,
        commits: list[Json],
        installation_id: int | None,
    ) -> Json:
        """``commits``: the new ones, oldest first, as ``github_git.commit`` shows them."""
        web = f"{self.web}/{repository.full_name}"
        pusher = {"name": "octocat", "email": "octocat@users.noreply.github.com"}
        none = "0" * len(after)
        shown = [
            {
                **commit,
                "distinct": True,
                "url": f"{web}/commit/{commit['id']}",
                "added": [],
                "removed": [],
                "modified": [],
            }
            for commit in commits
        ]
        event: Json = {
            "ref": ref,
            "before": before,
            "after": after,
            "base_ref": None,
            "compare": f"{web}/compare/{before[:12]}...{after[:12]}",
            "created": before == none,
            "deleted": after == none,
            "forced": False,
            "commits": shown,
            "head_commit": shown[-1] if shown else None,
            "pusher": pusher,
            "repository": {
                **self.repository(repository),
                "created_at": 1767225600,
                "pushed_at": int(time.time()),
                "stargazers": 0,
                "master_branch": repository.default_branch,
            },
            "sender": self.user("octocat"),
        }
        if repository.organization:
            event["organization"] = self.organization(repository.owner)
        if installation_id is not None:
            event["installation"] = {"id": installation_id, "node_id": node("Installation", installation_id)}
        return event

    def installation(self, number: int, owner: str, app_id: int) -> Json:
        url = f"{self.api}/app/installations/{number}"
        return {
            "id": number,
            "account": self.user(owner, organization=True),
            "access_tokens_url": f"{url}/access_tokens",
            "repositories_url": f"{self.api}/installation/repositories",
            "html_url": f"{self.web}/organizations/{owner}/settings/installations/{number}",
            "app_id": app_id,
            "app_slug": "microvm",
            "target_id": sum(owner.encode()),
            "target_type": "Organization",
            "permissions": {
                "actions": "read",
                "administration": "write",
                "organization_self_hosted_runners": "write",
                "metadata": "read",
            },
            "events": ["push", "workflow_job"],
            "single_file_name": None,
            "repository_selection": "all",
            "created_at": _CREATED,
            "updated_at": _CREATED,
            "suspended_by": None,
            "suspended_at": None,
        }
