import botocore.exceptions
import pytest

from millrace.errors import ProviderTrouble
from millrace.vocabulary import Trouble
from scheduler.fleets import aws


def refused(code: str, message: str = "no", status: int = 400) -> botocore.exceptions.ClientError:
    return botocore.exceptions.ClientError(
        {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}},
        "RunTask",
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (refused("ThrottlingException", "Rate exceeded"), Trouble.THROTTLED),
        (refused("RequestLimitExceeded"), Trouble.THROTTLED),
        (refused("Throttling"), Trouble.THROTTLED),
        (refused("InsufficientInstanceCapacity"), Trouble.CAPACITY),
        (refused("ClientException", "Capacity is unavailable at this time."), Trouble.CAPACITY),
        (
            refused("ThrottlingException", "You've reached the limit on the number of vCPUs you can run concurrently"),
            Trouble.THROTTLED,
        ),
        (refused("AccessDeniedException"), Trouble.CREDENTIALS),
        (refused("UnrecognizedClientException"), Trouble.CREDENTIALS),
        (refused("ExpiredTokenException"), Trouble.CREDENTIALS),
        (refused("ClusterNotFoundException", "Cluster not found."), Trouble.MISSING),
        (refused("InvalidParameterException", "subnet-1 does not exist"), Trouble.MISSING),
        (refused("ServerException", "try again", status=500), Trouble.AWAY),
        (refused("ServiceUnavailable", "", status=503), Trouble.AWAY),
        (botocore.exceptions.NoCredentialsError(), Trouble.CREDENTIALS),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://nowhere"), Trouble.AWAY),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://nowhere"), Trouble.AWAY),
    ],
)
def test_what_aws_says_becomes_one_of_our_troubles(error: Exception, kind: Trouble) -> None:
    with pytest.raises(ProviderTrouble) as caught, aws.translated("the cluster builds"):
        raise error
    assert caught.value.trouble is kind
    assert caught.value.message.startswith("the cluster builds: ")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("RESOURCE:ENI", Trouble.CAPACITY), ("RESOURCE:CPU", Trouble.CAPACITY), ("MISSING", Trouble.MISSING)],
)
def test_reasons_of_half_an_answer_become_troubles(reason: str, kind: Trouble) -> None:
    assert aws.trouble("a task", reason).trouble is kind


def test_a_client_has_little_patience_and_the_address_it_is_given() -> None:
    client = aws.client("ecs", "eu-central-1", "http://127.0.0.1:9")
    assert client.meta.endpoint_url == "http://127.0.0.1:9"
    assert client.meta.region_name == "eu-central-1"
    assert client.meta.config.retries["total_max_attempts"] == 3


def test_an_address_that_is_none_is_said_to_be() -> None:
    with pytest.raises(ProviderTrouble, match="nonsense"):
        aws.client("ecs", "eu-central-1", "nonsense")
